import hashlib
import json
import re

import pytest

from recipes.code.jsonl import Labelled, file_digest, read_jsonl

GOOD = b'{"func": "f()", "target": 0}\n'


def test_both_spellings_and_what_is_passed_over(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"func": "a", "target": 1, "idx": 3},
        {"code": "b", "label": 0, "tokens": ["b"]},
        {"func": "c", "code": "no", "target": True, "label": 0},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_jsonl(path) == [Labelled("a", 1), Labelled("b", 0), Labelled("c", 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"func": "f()"', "the line must be one JSON object"),
        (b'{"func": "\xff", "target": 1}', "the line must be one JSON object"),
        (b"[1, 2]", "the line must be a JSON object, got list."),
        (b'{"target": 1, "idx": 2}', "must have `func` or `code`, it has `target`, `idx`."),
        (b'{"func": "f()"}', "must have `target` or `label`, it has `func`."),
        (b"{}", "must have `func` or `code`, it has no key."),
        (b'{"func": " \\n", "target": 1}', "the code must be text that is not blank, got ' \\n'."),
        (b'{"func": 5, "target": 1}', "the code must be text that is not blank, got 5."),
        (b'{"func": "f()", "target": 2}', "the label must be 0 or 1, got 2."),
        (b'{"func": "f()", "target": "1"}', "the label must be 0 or 1, got '1'."),
        (b'{"func": "f()", "target": null}', "the label must be 0 or 1, got None."),
        (b'{"func": "f()", "target": [1]}', "the label must be 0 or 1, got [1]."),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ")) as caught:
        read_jsonl(path)
    assert message in str(caught.value)


def test_an_empty_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: the file must hold at least one function"):
        read_jsonl(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`val_path` must name a JSON Lines file, got .*no"
    ):
        read_jsonl(tmp_path / "no.jsonl", "val_path")


def test_digest(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD)
    assert file_digest(path) == hashlib.sha256(GOOD).hexdigest()
