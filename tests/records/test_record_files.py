import copy
import json
import math
import multiprocessing
import os
import pickle
import stat
import threading

import pytest

from lightning_diag.records.files import LineWriter, write_json, write_text


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one\r\nü")
    assert path.read_bytes() == "one\r\nü".encode()
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_json_is_safe_and_readable(tmp_path):
    write_json(tmp_path / "a.json", {"b": math.nan, "a": {1}})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": null,\n  "a": [\n    1\n  ]\n}\n'


def test_a_file_has_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "a.txt", "")
    plain, ours = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.txt"))
    assert ours == plain


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_unknown_type_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError, match=r"`value.x` must be .*, got object"):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_a_reader_sees_whole_files_only(tmp_path):
    path = tmp_path / "a.json"
    texts = {json.dumps({"k": letter * 100_000}) for letter in "ab"}
    write_text(path, min(texts))
    done = threading.Event()

    def write():
        for _ in range(50):
            for text in sorted(texts):
                write_text(path, text)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert path.read_text() in texts
    thread.join()


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    writer = LineWriter(tmp_path / "records" / "a.jsonl")
    assert not (tmp_path / "records").exists()
    for number in range(3):
        writer.write(f"line {number}")
        expected = "".join(f"line {i}\n" for i in range(number + 1))
        assert writer.path.read_text() == expected
    writer.close()
    writer.close()
    writer.write("again")
    assert writer.path.read_text().endswith("line 2\nagain\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b"new\n"), (b"old\n", b"old\nnew\n"), (b'{"torn": 1', b'{"torn": 1\nnew\n')],
)
def test_a_torn_end_is_closed_first(tmp_path, before, after):
    path = tmp_path / "a.jsonl"
    path.write_bytes(before)
    LineWriter(path).write("new")
    assert path.read_bytes() == after


def test_each_line_is_one_write(tmp_path, monkeypatch):
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (written.append(data), write(fd, data))[1])
    writer = LineWriter(tmp_path / "a.jsonl")
    writer.write("x" * 100_000)
    writer.write("y")
    assert written == [b"x" * 100_000 + b"\n", b"y\n"]


def short_writes(monkeypatch, *lengths):
    """Make the next writes take these numbers of bytes only; None takes all."""
    left = list(lengths)
    write = os.write

    def short(fd, data):
        length = left.pop(0) if left else None
        return write(fd, data if length is None else data[:length])

    monkeypatch.setattr(os, "write", short)


def test_a_line_cut_by_a_signal_is_written_again(tmp_path, monkeypatch):
    writer = LineWriter(tmp_path / "a.jsonl")
    writer.write("one")
    short_writes(monkeypatch, 2)
    writer.write("three")
    writer.write("four")
    assert writer.path.read_text() == "one\nth\nthree\nfour\n"


def test_a_line_that_lacks_its_newline_is_not_written_twice(tmp_path, monkeypatch):
    writer = LineWriter(tmp_path / "a.jsonl")
    short_writes(monkeypatch, 3)
    writer.write("one")
    writer.write("two")
    assert writer.path.read_text() == "one\ntwo\n"


def test_a_line_cut_by_a_full_disk_is_an_error_and_is_closed_later(tmp_path, monkeypatch):
    writer = LineWriter(tmp_path / "a.jsonl")
    short_writes(monkeypatch, 2, 0)
    with pytest.raises(OSError, match="No space left"):
        writer.write("one")
    writer.write("two")
    assert writer.path.read_text() == "on\ntwo\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_each_time():
    writer = LineWriter("/dev/full")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            writer.write("one")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_opens_the_file_itself(tmp_path, copied):
    writer = LineWriter(tmp_path / "a.jsonl")
    writer.write("one")
    other = copied(writer)
    other.write("two")
    del other
    writer.write("three")
    assert writer.path.read_text() == "one\ntwo\nthree\n"


def test_a_half_made_writer_can_be_dropped():
    writer = LineWriter.__new__(LineWriter)
    writer.__del__()


def _write_many(writer, name, length):
    for number in range(400):
        writer.write(json.dumps({"who": name, "n": number, "pad": "x" * length}))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_do_not_tear_each_others_lines(tmp_path, method):
    writer = LineWriter(tmp_path / "a.jsonl")
    writer.write(json.dumps({"who": 0, "n": -1}))
    context = multiprocessing.get_context(method)
    processes = [
        context.Process(target=_write_many, args=(writer, name, 50 + 9000 * name))
        for name in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = [json.loads(line) for line in writer.path.read_text().splitlines() if line]
    for name in range(2):
        assert [row["n"] for row in rows if row["who"] == name and row["n"] >= 0] == [*range(400)]
