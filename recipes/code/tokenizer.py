"""Source text to numbers: readable tokens line by line, hashed ids, and which names recur."""

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

__all__ = ["MAX_NAMES", "PADDING", "Encoded", "encode", "tokens"]

PADDING = 0
MAX_NAMES = 63
_TOKEN = re.compile(
    r"[^\W\d]\w*|\d+(?:\.\d+)?|==|!=|<=|>=|->|::|\+=|-=|\*\*|//|&&|\|\||<<|>>|[^\w\s]|\w"
)
_DEEPEST = 7
_BRACKETS = {"(": 1, "[": 1, ")": -1, "]": -1}


class Encoded(NamedTuple):
    """One text as lists of equal length, with one entry a token.

    Attributes:
        ids: the token, hashed into ``1 .. vocabulary_size - 1``, so that equal tokens of all texts
            share an id without a stored vocabulary.
        statement: the line that it stands in, counted from 0 without blank lines.
        column: its place in the line; column 0 is the line's depth of indentation.
        name: the number, from 1, of a name to which the text assigns; 0 for every other token.
        assigns: 1 where the line assigns to that name, else 0.
    """

    ids: list[int]
    statement: list[int]
    column: list[int]
    name: list[int]
    assigns: list[int]


def tokens(code: str) -> Iterator[list[str]]:
    r"""The tokens of each line that is not blank, behind a mark for its depth of indentation.

    Args:
        code: source text in any language that breaks lines at statements.

    Yields:
        One list a line.

    Example:
        >>> list(tokens("if n_max >= 2:\n    run(n_max)"))
        [['<0>', 'if', 'n_max', '>=', '2', ':'], ['<1>', 'run', '(', 'n_max', ')']]
    """
    for line in code.splitlines():
        words = _TOKEN.findall(line)
        if words:
            text = line.expandtabs(4)
            depth = (len(text) - len(text.lstrip())) // 4
            yield [f"<{min(depth, _DEEPEST)}>", *words]


def encode(code: str, *, vocabulary_size: int, max_length: int) -> Encoded:
    r"""A text as numbers, cut off after ``max_length`` tokens.

    Args:
        code: source text.
        vocabulary_size: number of ids, that of padding included.
        max_length: most tokens that are kept.

    Returns:
        The numbers of each token.

    Example:
        >>> encode("a = 1\nb = a", vocabulary_size=100, max_length=9).name
        [0, 1, 0, 0, 0, 2, 0, 1]
    """
    lines = list(tokens(code))
    targets = [_assigned_columns(line) for line in lines]
    names = _numbered(
        line[column] for line, columns in zip(lines, targets, strict=True) for column in columns
    )
    encoded = Encoded([], [], [], [], [])
    for statement, (line, columns) in enumerate(zip(lines, targets, strict=True)):
        for column, token in enumerate(line):
            encoded.ids.append(1 + zlib.crc32(token.encode()) % (vocabulary_size - 1))
            encoded.statement.append(statement)
            encoded.column.append(column)
            encoded.name.append(names.get(token, 0))
            encoded.assigns.append(int(column in columns))
    return Encoded(*(field[:max_length] for field in encoded))


def _assigned_columns(line: list[str]) -> list[int]:
    """Where a name stands right before ``=`` outside of brackets."""
    columns = []
    depth = 0
    for column, (token, following) in enumerate(pairwise(line)):
        depth += _BRACKETS.get(token, 0)
        if following == "=" and depth == 0 and token.isidentifier():
            columns.append(column)
    return columns


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names), start=1) if i <= MAX_NAMES}
