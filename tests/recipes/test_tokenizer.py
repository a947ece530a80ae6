import ast
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.code.tokenizer import MAX_NAMES, encode, tokens

CODE = "total = 0\n\nfor x in xs:\n\ttotal += x\nrun(key=total, n=2.5)\nname == total"


def test_tokens_by_hand():
    assert list(tokens(CODE)) == [
        ["<0>", "total", "=", "0"],
        ["<0>", "for", "x", "in", "xs", ":"],
        ["<1>", "total", "+=", "x"],
        ["<0>", "run", "(", "key", "=", "total", ",", "n", "=", "2.5", ")"],
        ["<0>", "name", "==", "total"],
    ]


def test_numbers_by_hand():
    encoded = encode("a = 1\nb = f(a, c=a)", vocabulary_size=1000, max_length=100)
    assert encoded.statement == [0] * 4 + [1] * 11
    assert encoded.column == [*range(4), *range(11)]
    #                        a           b              a           c           a
    assert encoded.name == [0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert encoded.assigns == [0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert encoded.ids[1] == 1 + zlib.crc32(b"a") % 999


def test_equal_tokens_share_an_id_across_texts():
    first = encode("x = payload", vocabulary_size=8192, max_length=9)
    second = encode("payload", vocabulary_size=8192, max_length=9)
    assert first.ids[3] == second.ids[1]
    assert first.ids[1] != second.ids[1]


def test_a_c_declaration_names_its_variable():
    encoded = encode("int size = 4;\nfree(size);", vocabulary_size=100, max_length=99)
    assert encoded.name == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_names_beyond_the_limit_have_no_number():
    code = "\n".join(f"v{i} = {i}" for i in range(MAX_NAMES + 5))
    encoded = encode(code, vocabulary_size=100, max_length=10_000)
    assert max(encoded.name) == MAX_NAMES
    assert encoded.name[-3] == 0


def test_cut_off():
    assert {len(field) for field in encode(CODE, vocabulary_size=50, max_length=7)} == {7}


@given(st.text(max_size=200), st.integers(2, 50), st.integers(1, 60))
def test_any_text(text, vocabulary_size, max_length):
    encoded = encode(text, vocabulary_size=vocabulary_size, max_length=max_length)
    assert len({len(field) for field in encoded}) == 1
    assert len(encoded.ids) <= max_length
    assert all(0 < i < vocabulary_size for i in encoded.ids)
    assert bool(encoded.ids) == bool(text.strip())
    assert "".join(t for line in tokens(text) for t in line[1:]) == "".join(text.split())


def test_assigned_names_agree_with_the_syntax_tree(corpus):
    """On planted functions: each simple assignment at the start of a line, by ast."""
    for sample in corpus[:300]:
        planted = {
            node.targets[0].id
            for node in ast.walk(ast.parse(sample.func))
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        lines = list(tokens(sample.func))
        encoded = encode(sample.func, vocabulary_size=100, max_length=100_000)
        words = [token for line in lines for token in line]
        named = {w for w, assigns in zip(words, encoded.assigns, strict=True) if assigns}
        assert planted <= named


@pytest.mark.parametrize("separator", ["\n", "\r\n"])
def test_line_ends(separator):
    assert len(list(tokens(f"a{separator}b"))) == 2
