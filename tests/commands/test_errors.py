"""Are errors told so that a user can act on them?"""

import json

import pytest
import typer

from lightning_diag.commands.errors import plain_errors


def test_an_error_of_a_file_says_which_and_where_it_was_wanted(tmp_path, capsys):
    def said(act):
        with pytest.raises(typer.Exit), plain_errors(False):
            act()
        return capsys.readouterr().err

    missing, folder = tmp_path / "none.txt", tmp_path / "here"
    folder.mkdir()
    read = said(lambda: missing.read_text())
    assert read.startswith(f"error: cannot read {missing}: No such file or directory.\n")
    assert f"in {__file__}:" in read
    assert said(lambda: missing.stat()).startswith(f"error: cannot use {missing}: No such file")
    assert said(lambda: folder.mkdir()).startswith(f"error: cannot make {folder}: File exists.")
    moved = said(lambda: missing.rename(folder / "x"))
    assert f"cannot rename {missing} as {folder / 'x'}: " in moved
    asked = said(lambda: json.loads("{"))
    assert asked.startswith("error: JSONDecodeError: ")
    assert "decoder.py:" in asked
