"""Passwords and keys out of what is written: values under telling names become ``***``."""

import re
from collections.abc import Mapping

from lightning_diag.records.json_safe import Json

__all__ = ["mask_secrets"]

_MASK = "***"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LOGIN = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)")
_SECRET = {
    "apikey", "authorization", "credential", "credentials", "passphrase", "passwd", "password",
    "passwords", "pwd", "secret", "secrets",
}  # fmt: skip
_KEYED = {"access", "account", "api", "auth", "encryption", "private", "secret", "signing", "ssh"}
_VOCABULARY = {
    "bos", "class", "cls", "end", "eos", "image", "mask", "pad", "sep", "special", "start", "unk",
    "unknown",
}  # fmt: skip


def mask_secrets(value: Json, key: str = "") -> Json:
    """The same value with ``***`` wherever a key says password, token, secret, API key or alike.

    A name counts by its last word, so ``api_key``, ``hf_token`` and ``dbPassword`` are masked,
    ``tokenizer``, ``max_tokens`` and ``pad_token`` are not. A password inside a URL is masked too.

    Args:
        value: JSON-safe; it is not changed.
        key: The key under which the value stands.

    Returns:
        The value to write.

    Example:
        >>> mask_secrets({"api_key": "abc", "max_tokens": 5, "db": "pg://me:pw@host/x"})
        {'api_key': '***', 'max_tokens': 5, 'db': 'pg://me:***@host/x'}
    """
    if value is not None and _is_secret(key, value):
        return _MASK
    if isinstance(value, Mapping):
        return {name: mask_secrets(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [mask_secrets(item) for item in value]
    return _LOGIN.sub(rf"\1{_MASK}", value) if isinstance(value, str) else value


def _is_secret(key: str, value: Json) -> bool:
    words = [word.lower() for word in _WORD.findall(key)]
    if not words or isinstance(value, bool):
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in {"key", "keys"}:
        return before in _KEYED
    if last in {"token", "tokens"}:
        return before not in _VOCABULARY and not isinstance(value, (int, float))
    return last in _SECRET
