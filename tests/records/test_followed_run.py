"""Is a run that goes on read whole, once, and without losing its place?"""

import json
import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diag.records.followed_run import FollowedRun
from lightning_diag.records.read_run import read_run


def row(step, component="a", attempt=1, **more):
    fields = {"step": step, "epoch": 0, "time": 1.0, "attempt": attempt, "component": component}
    return json.dumps(fields | more) + "\n"


def begin(folder, attempts=({"attempt": 1, "first_step": 0},)):
    (folder / "records").mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"attempts": list(attempts)}))
    return folder / "records" / "grad.jsonl"


def test_what_was_added_is_read_and_nothing_twice(tmp_path):
    file = begin(tmp_path)
    file.write_text(row(0) + row(1))
    run = FollowedRun(tmp_path)
    assert run.update() == {"grad"}
    assert run.update() == set()
    with file.open("a") as stream:
        stream.write(row(2, l2=0.5))
    assert run.update() == {"grad"}
    assert run.frame("grad")["step"].to_list() == [0, 1, 2]
    assert run.frame("grad")["l2"].to_list() == [None, None, 0.5]


def test_a_line_is_read_when_it_is_whole(tmp_path):
    file = begin(tmp_path)
    line = row(0, l2=1.0)
    file.write_text(line[:20])
    run = FollowedRun(tmp_path)
    assert run.update() == set()
    file.write_text(line)
    assert run.update() == {"grad"}
    assert run.torn == {}


def test_a_torn_line_is_counted_and_the_next_ones_are_read(tmp_path):
    file = begin(tmp_path)
    file.write_text(row(0) + '{"step": 1, "ep\n' + row(2))
    run = FollowedRun(tmp_path)
    run.update()
    assert run.frame("grad")["step"].to_list() == [0, 2]
    assert run.torn == {"grad": 1}


def test_a_run_that_has_not_begun_appears_later(tmp_path):
    run = FollowedRun(tmp_path / "later")
    assert run.update() == set()
    assert not run.exists
    (tmp_path / "later").mkdir()
    begin(tmp_path / "later").write_text(row(0))
    assert run.update() == {"grad"}
    assert run.exists


def test_a_run_that_is_deleted_is_gone(tmp_path):
    file = begin(tmp_path)
    file.write_text(row(0))
    run = FollowedRun(tmp_path)
    run.update()
    file.unlink()
    (tmp_path / "run.json").unlink()
    assert run.update() == {"grad"}
    assert run.prefixes == []
    assert not run.exists


def test_a_file_that_shrank_is_read_anew(tmp_path):
    file = begin(tmp_path)
    file.write_text("".join(row(step) for step in range(10)))
    run = FollowedRun(tmp_path)
    run.update()
    file.write_text(row(77))
    run.update()
    assert run.frame("grad")["step"].to_list() == [77]


def test_a_resumed_run_reads_as_the_whole_reader_does(tmp_path):
    file = begin(tmp_path)
    file.write_text("".join(row(step) for step in range(10)))
    run = FollowedRun(tmp_path)
    run.update()
    size = file.stat().st_size
    at = len("".join(row(step) for step in range(5)))
    second = {"attempt": 2, "first_step": 5, "resumed_at": {"grad": at}, "began_at": {"grad": size}}
    begin(tmp_path, [{"attempt": 1, "first_step": 0}, second])
    with file.open("a") as stream:
        stream.writelines(row(step, attempt=2) for step in range(5, 8))
    run.update()
    assert run.frame("grad").equals(read_run(tmp_path).frame("grad"))
    assert run.frame("grad")["step"].to_list() == list(range(8))


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, 400), max_size=6))
def test_any_cuts_give_what_one_reading_gives(cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    file = begin(folder)
    text = "".join(row(step, part) for step in range(12) for part in ("a", None))
    run = FollowedRun(folder)
    places = sorted({min(len(text), sum(cuts[: n + 1])) for n in range(len(cuts))} | {len(text)})
    for place in places:
        file.write_text(text[:place])
        run.update()
    assert run.frame("grad").equals(read_run(folder).frame("grad"))


def test_of_a_long_run_older_steps_are_thinned_evenly_and_whole(tmp_path):
    file = begin(tmp_path)
    run = FollowedRun(tmp_path, most_rows=400)
    with file.open("w") as stream:
        for step in range(5000):
            stream.write(row(step * 10, "a") + row(step * 10, None))
            if step % 37 == 0:
                stream.flush()
                run.update()
    run.update()
    frame = run.frame("grad")
    steps = frame["step"].unique().sort().to_list()
    assert len(frame) <= 600
    assert steps[0] == 0
    assert steps[-40:] == [step * 10 for step in range(4960, 5000)]
    # both rows of a step are kept, or none
    assert set(frame["step"].value_counts()["count"].to_list()) == {2}
    gaps = [b - a for a, b in pairwise(steps[1:-60])]
    assert max(gaps) <= 64 * 10


def test_a_look_at_a_long_run_reads_the_new_end_alone(tmp_path):
    file = begin(tmp_path)
    file.write_text("".join(row(step, l2=1.0) for step in range(60_000)))
    run = FollowedRun(tmp_path)
    while run.update() and run.behind:
        pass
    before = os.stat(file).st_size
    with file.open("a") as stream:
        stream.write(row(60_000, l2=1.0))
    read = []
    opened = type(file).open

    def counting(self, *args, **kwargs):
        stream = opened(self, *args, **kwargs)
        if self.name == "grad.jsonl":
            read.append(stream)
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(file), "open", counting)
        run.update()
    assert len(read) == 1
    assert run._files["grad"].offset == os.stat(file).st_size > before


def test_few_rows_are_refused():
    with pytest.raises(ValueError, match="`most_rows` must be at least 100, got 5"):
        FollowedRun("anywhere", most_rows=5)
