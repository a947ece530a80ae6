"""What is stored comes back whole or not at all, whatever happens to the file and the processes."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diag.tuning.lr_store import Entry, LRStore, key_of
from tests.tuning import lr_store_cases as cases
from tests.tuning.lr_store_cases import PARTS, curve, entry

SPAWN = multiprocessing.get_context("spawn")
SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
VALUES = st.one_of(SIMPLE, st.lists(SIMPLE, max_size=4))
PART_DICTS = st.dictionaries(st.text(), VALUES, max_size=6)


@pytest.fixture
def store(tmp_path):
    return LRStore(tmp_path / "cache")


def names(store):
    """Every file below the folder."""
    return sorted(str(one.relative_to(store.folder)) for one in store.folder.rglob("*.*"))


# --- keys


@given(PART_DICTS, st.randoms())
def test_a_key_does_not_depend_on_the_order(parts, rng):
    pairs = list(parts.items())
    rng.shuffle(pairs)
    assert key_of(dict(pairs)) == key_of(parts)
    assert re.fullmatch(r"[0-9a-f]{32}", key_of(parts))


@given(PART_DICTS.filter(bool), VALUES, st.data())
def test_any_other_part_gives_another_key(parts, value, data):
    name = data.draw(st.sampled_from(sorted(parts)))
    without = {one: parts[one] for one in parts if one != name}
    assert key_of(without) != key_of(parts)
    if json.dumps(value) != json.dumps(parts[name]):
        assert key_of({**parts, name: value}) != key_of(parts)


@given(PART_DICTS)
def test_a_key_survives_json(parts):
    assert key_of(json.loads(json.dumps(parts))) == key_of(parts)


def test_a_key_is_what_sha256_says():
    import hashlib

    text = '{"batch":64,"lr":0.1,"name":"\\u00fc","on":true}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert key_of({"on": True, "name": "ü", "lr": 0.1, "batch": 64}) == expected
    assert len({key_of({"a": value}) for value in (1, 1.0, True, "1", None, [1])}) == 6
    assert key_of({"a": (1, (2, 3))}) == key_of({"a": [1, [2, 3]]}) != key_of({"a": [1, 2, 3]})


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        ({1: 2}, TypeError, r"name of a part must be a string, got 1\."),
        ({"a": {}}, TypeError, r"Part `a` must be text, .*, got dict\."),
        ({"a": [[{1}]]}, TypeError, r"Part `a` must be .*, got set\."),
        ({"a": math.inf}, ValueError, r"Part `a` must be finite, got inf\."),
        ({"a": [math.nan]}, ValueError, r"Part `a` must be finite, got nan\."),
        ([("a", 1)], TypeError, r"`parts` must be a mapping, got list\."),
    ],
)
def test_parts_that_make_no_key(parts, error, said):
    with pytest.raises(error, match=said):
        key_of(parts)


# --- entries and arguments


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"lr": 0.0}, ValueError, r"`lr` must be above 0, got 0\.0\."),
        ({"lr": None}, TypeError, r"`lr` must be a number, got None\."),
        ({"lr": math.nan}, ValueError, r"`lr` must be finite, got nan\."),
        ({"slope": True}, TypeError, r"`slope` must be a number, got True\."),
        ({"noise": math.inf}, ValueError, r"`noise` must be finite, got inf\."),
        ({"confidence": "none"}, ValueError, r"must be high or medium, got 'none'\."),
        ({"key": "0" * 32}, ValueError, r"`key` must be `key_of\(parts\)`, got '0000"),
        ({"created": "2026-01-01T00:00:00"}, ValueError, r"ISO 8601 with a zone, got '2026-01-01T"),
        ({"created": "yesterday"}, ValueError, r"`created` must be ISO 8601"),
        ({"created": None}, ValueError, r"`created` must be ISO 8601 with a zone, got None\."),
        ({"curve": {"lr": [1.0]}}, ValueError, r"must have the lists lr, loss and smoothed"),
        ({"curve": curve(0)}, ValueError, r"one length above 0, got \[0, 0, 0\]\."),
        ({"curve": {**curve(3), "loss": [1.0]}}, ValueError, r"one length above 0, got \[3, 1, 3"),
        ({"curve": {**curve(1), "loss": [math.nan]}}, ValueError, r"`curve.loss` must be finite"),
        ({"curve": {**curve(1), "loss": "x"}}, TypeError, r"`curve.loss` must be a list, got str"),
        ({"versions": {"torch": 2}}, TypeError, r"`versions` must map names to text"),
    ],
)
def test_what_is_no_entry(change, error, said):
    with pytest.raises(error, match=said):
        replace(entry(), **change)


@pytest.mark.parametrize(
    ("hours", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)],
)
def test_ages_that_are_none(tmp_path, hours, error):
    with pytest.raises(error, match=r"`max_age_hours` must be (above 0|a number), got"):
        LRStore(tmp_path, hours)


def test_the_folder_must_be_no_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match=r"`folder` must be a folder, got .*/a, which is a file\."):
        LRStore(tmp_path / "a")


def test_the_folder_by_default_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if os.uname().sysname == "Linux":
        assert LRStore().folder == tmp_path / "lightning_diag" / "learning_rates"
    assert LRStore("~/x").folder == Path.home() / "x"
    monkeypatch.chdir(tmp_path)
    store = LRStore("here")
    monkeypatch.chdir("/")
    assert store.folder == tmp_path / "here"


def test_reading_makes_nothing_on_disk(store):
    assert store.read(key_of({})) is None
    assert store.entries() == []
    assert store.difference({}) is None
    assert store.clear() == 0
    assert not store.folder.exists()


# --- write and read


def test_what_is_written_is_read(store):
    one = entry(parts={"a": "ü\ud800", "b": [1, 0.1 + 0.2, None, True], "c": 10**30})
    store.write(one)
    assert store.read(one.key) == one
    assert names(store) == [f"{one.key}.json"]
    again = replace(one, lr=2e-3)
    store.write(again)
    assert store.read(one.key).lr == 2e-3
    assert names(store) == [f"{one.key}.json"]
    assert json.loads(store.path(one.key).read_text())["lr"] == 2e-3


def test_a_file_has_the_permissions_of_an_ordinary_file(store):
    store.write(entry())
    (store.folder / "plain").write_text("")
    modes = {one.stat().st_mode for one in store.folder.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("without", ["O_TMPFILE", "/proc"])
def test_a_system_without_nameless_files(store, monkeypatch, without):
    def refuse(*args, **options):
        raise FileNotFoundError(2, "No such file or directory")

    if without == "O_TMPFILE":
        monkeypatch.delattr(os, "O_TMPFILE")
    else:
        monkeypatch.setattr(os, "link", refuse)
    for lr in (1e-3, 2e-3):
        store.write(entry(lr=lr))
        assert store.read(entry().key).lr == lr
    assert names(store) == [f"{entry().key}.json"]


def test_a_hit_is_quick(store):
    for batch in range(50):
        store.write(entry(batch=batch))
    key, times = entry(batch=7).key, []
    for _ in range(50):
        start = time.perf_counter()
        assert store.read(key)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 3e-3


# --- age


def test_an_entry_expires(tmp_path):
    store = LRStore(tmp_path, max_age_hours=10)
    for hours, found in ((0, True), (9.9, True), (10.1, False), (1e5, False)):
        store.write(entry(hours))
        assert (store.read(entry().key) is not None) is found
        assert names(store) == [f"{entry().key}.json"]
    assert LRStore(tmp_path, math.inf).read(entry().key) is not None


def test_a_date_to_come_is_a_miss_and_is_left_in_place(tmp_path):
    store = LRStore(tmp_path, math.inf)
    store.write(entry(-0.9))
    assert store.read(entry().key) is not None
    store.write(entry(-1.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(entry().key) is None
    assert names(store) == [f"{entry().key}.json"]
    assert "which is to come" in store.difference(PARTS)


def test_the_zone_of_a_date_counts(store):
    one = replace(entry(160), created=re.sub(r"\+00:00$", "-10:00", entry(160).created))
    store.write(one)  # ten hours later than it reads
    assert store.read(one.key) == one
    store.write(replace(one, created=re.sub(r"-10:00$", "+10:00", one.created)))
    assert store.read(one.key) is None


# --- corrupt files


def damaged():
    whole = json.loads(cases_content())
    yield "empty", b""
    yield "torn", cases_content()[:700]
    yield "zeros", bytes(3000)
    yield "bytes", b"\xff\xfe{}"
    yield "deep", b"[" * 100_000
    yield "list", b"[1, 2]"
    for name, changed in {
        "field gone": {key: whole[key] for key in whole if key != "lr"},
        "field more": {**whole, "x": 1},
        "digest gone": {key: whole[key] for key in whole if key != "sha256"},
        "number": {**whole, "lr": 0.5},
        "type": {**whole, "curve": 3},
        "NaN": {**whole, "lr": math.nan},
    }.items():
        yield name, json.dumps(changed).encode()


def cases_content():
    from lightning_diag.tuning.lr_store_entry import encoded

    return encoded(entry())


@pytest.mark.parametrize("content", [pytest.param(text, id=name) for name, text in damaged()])
def test_a_corrupt_file_is_a_miss_and_is_set_aside(store, content):
    key = entry().key
    store.write(entry())
    store.path(key).write_bytes(content)
    assert store.entries() == []
    assert names(store) == [f"{key}.json"]
    with pytest.warns(UserWarning, match=rf"is corrupt, .*set aside as {key}.json.corrupt") as told:
        assert store.read(key) is None
    assert len(told) == 1
    assert told[0].filename == __file__
    assert names(store) == [f"{key}.json.corrupt"]
    assert (store.folder / f"{key}.json.corrupt").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(key) is None
    store.write(entry())
    assert store.read(key).lr == 1e-3
    assert store.clear() == 2
    assert names(store) == []


def test_a_well_made_file_of_wrong_values_is_corrupt(store):
    from lightning_diag.tuning.lr_store_entry import encoded

    one = entry()
    object.__setattr__(one, "lr", -1.0)
    store.folder.mkdir()
    store.path(one.key).write_bytes(encoded(one))
    with pytest.warns(UserWarning, match=r"is corrupt, `lr` must be above 0, got -1\.0\.: it is"):
        assert store.read(one.key) is None


def test_a_file_under_the_name_of_another_is_corrupt(store):
    store.write(entry())
    other = entry(batch=1).key
    store.path(entry().key).rename(store.path(other))
    with pytest.warns(UserWarning, match=f"it belongs to the key {entry().key}"):
        assert store.read(other) is None


def test_another_format_is_a_miss_and_stays(store):
    key = entry().key
    store.folder.mkdir()
    for content in ({"lr": 0.1, "timestamp": 3}, {"format": 2, "rate": 0.1}):
        store.path(key).write_text(json.dumps(content))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store.read(key) is None
            assert store.entries() == []
        assert json.loads(store.path(key).read_text()) == content
    store.write(entry())
    assert store.read(key) == store.entries()[0]


def test_what_cannot_be_read_is_passed_over(store):
    key = entry().key
    store.path(key).mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"cannot be read \(Is a directory\): it is passed over"):
        assert store.read(key) is None
    assert store.entries() == []


# --- why not


def test_the_parts_that_differ(store):
    store.write(entry(3, batch=64, decay=0.01))
    store.write(entry(2, batch=64, decay=0.5, clip=1.0))
    asked = {**PARTS, "batch": 32, "decay": 0.1}
    assert store.difference(asked) == "batch: 64 -> 32, decay: 0.01 -> 0.1"
    assert store.difference({**PARTS, "decay": 0.01}) is None
    assert store.difference({**PARTS, "optimizer.betas": (0.9, 0.999), "decay": 0.01}) is None
    assert store.difference({**PARTS, "decay": 0.01, "x": [1, 2]}) == "x: absent -> [1,2]"
    del asked["model"]
    assert "model: mlp -> absent" in store.difference(asked)
    long = store.difference({**PARTS, "decay": "d" * 500})
    assert long == f"decay: 0.01 -> {'d' * 39}…"
    many = {**PARTS, "decay": 0.01, **{f"p{i}": i for i in range(20)}}
    assert store.difference(many).endswith("p7: absent -> 7, and 12 more")


def test_the_newest_of_the_nearest_is_compared(store):
    for hours, batch in ((5, 1), (2, 2), (8, 3)):
        store.write(entry(hours, batch=batch))
    assert store.difference({**PARTS, "batch": 9}) == "batch: 2 -> 9"


def test_an_expired_entry_is_said_to_be(store):
    store.write(entry(200))
    said = store.difference(PARTS)
    assert said == "the entry is expired: 200.0 h old, at most 168 h are allowed"
    said = store.difference({**PARTS, "batch": 1})
    assert said.startswith("batch: 64 -> 1 (and that entry is expired: 200.0 h old")
    store.write(entry(1, batch=8, clip=1.0))
    assert store.difference({**PARTS, "batch": 1}) == "batch: 8 -> 1, clip: 1.0 -> null"


# --- list, clear, names


def test_entries_are_listed_newest_first(store):
    for hours, batch in ((5, 1), (500, 2), (0, 3)):
        store.write(entry(hours, batch=batch))
    (store.folder / "notes.json").write_text("{}")
    assert [one.parts["batch"] for one in store.entries()] == [3, 1, 2]


def test_clear(store):
    written = [entry(hours, batch=batch) for batch, hours in enumerate((0, 1, 50, 500))]
    for one in written:
        store.write(one)
    (store.folder / "notes.json").write_text("{}")
    assert store.clear(older_than_hours=100) == 1
    assert store.clear([written[1].key[:9], written[1].key], older_than_hours=24) == 0
    assert store.clear([written[1].key[:9], written[1].key]) == 1
    assert [one.parts["batch"] for one in store.entries()] == [0, 2]
    with pytest.raises(ValueError, match=r"`older_than_hours` must be at least 0, got -1\."):
        store.clear(older_than_hours=-1)
    assert store.clear() == 2
    assert store.clear() == 0
    assert names(store) == ["notes.json"]


def test_clear_knows_the_age_of_what_it_cannot_read(store):
    store.folder.mkdir()
    for name, hours in (("a" * 32, 1), ("b" * 32, 100)):
        store.path(name).write_text("?")
        os.utime(store.path(name), (time.time() - 3600 * hours,) * 2)
    assert store.clear(older_than_hours=50) == 1
    assert names(store) == [f"{'a' * 32}.json"]


def test_a_beginning_must_be_one_keys(store):
    keys = []
    for batch in range(20):
        store.write(entry(batch=batch))
        keys.append(entry(batch=batch).key)
    same = next(digit for digit in "0123456789abcdef" if sum(k[0] == digit for k in keys) > 1)
    assert store.full_key(keys[3]) == keys[3]
    assert store.full_key(keys[3][:20]) == keys[3]
    with pytest.raises(ValueError, match=rf"told from the others, got `{same}`, with which \d beg"):
        store.full_key(same)
    with pytest.raises(ValueError, match="No entry has a key that begins with `00000000`"):
        store.full_key("00000000")
    with pytest.raises(ValueError, match="No entry has a key that begins with"):
        store.clear([keys[0], "00000000"])
    assert len(store.entries()) == 20


@pytest.mark.parametrize("key", ["../x", "", "*", "/etc/passwd", "A" * 32, "a" * 33, "a\n", "%2e"])
def test_a_hostile_key_never_leaves_the_folder(store, tmp_path, key):
    (tmp_path / "x.json").write_text("keep")
    store.write(entry())
    for use in (store.path, store.read, store.full_key, lambda one: store.clear([one])):
        with pytest.raises(ValueError, match=r"A key must be .*hexadecimal digits, got"):
            use(key)
    with pytest.raises(ValueError, match="A key must be"), store.lock(key):
        pass
    assert (tmp_path / "x.json").read_text() == "keep"
    assert len(store.entries()) == 1


# --- disks


@pytest.fixture
def mounted(tmp_path):
    """A file system of 64 KB that can be filled, or made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave not one page free."""
    with open(folder / "ballast", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_is_an_error_and_leaves_nothing(mounted):
    store = LRStore(mounted)
    fill(mounted)
    with pytest.raises(OSError, match="No space left"):
        store.write(entry())
    assert store.read(entry().key) is None
    with store.lock(entry().key):
        pass
    assert [one.name for one in mounted.rglob("*.*")] == []
    (mounted / "ballast").unlink()
    store.write(entry())
    assert store.read(entry().key).lr == 1e-3


def test_a_disk_without_room_for_an_older_entrys_successor_keeps_the_older(mounted):
    store = LRStore(mounted)
    store.write(entry(hours=3))
    fill(mounted)
    with pytest.raises(OSError, match="No space left"):
        store.write(entry(lr=0.5))
    assert store.read(entry().key).lr == 1e-3


def test_a_read_only_disk(mounted):
    store, key = LRStore(mounted), entry().key
    store.write(entry())
    store.path("a" * 32).write_text("?")
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    assert store.read(key).lr == 1e-3
    with pytest.raises(OSError, match="Read-only"):
        store.write(entry())
    with pytest.warns(UserWarning, match=r"is corrupt, .*: it is passed over\."):
        assert store.read("a" * 32) is None
    ran = False
    with (
        pytest.warns(UserWarning, match=r"cannot be locked \(.*\): jobs that run at the") as told,
        store.lock(key),
    ):
        ran = True
    assert ran
    assert len(told) == 1
    with pytest.raises(OSError, match="Read-only"):
        store.clear()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "a").write_text("")
    store = LRStore(tmp_path / "a" / "b")
    assert store.entries() == []
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        store.write(entry())
    with pytest.warns(UserWarning, match="cannot be locked"), store.lock(entry().key):
        pass
    with pytest.warns(UserWarning, match="cannot be read"):
        assert store.read(entry().key) is None


# --- processes


def log(store):
    path = Path(f"{store.folder}.log")
    return path.read_text().split("\n")[:-1] if path.exists() else []


def await_log(store, text, seconds=60):
    end = time.monotonic() + seconds
    while not any(text in line for line in log(store)):
        assert time.monotonic() < end, f"{text!r} is not in {log(store)}"
        time.sleep(0.005)


def start(function, *arguments):
    process = SPAWN.Process(target=function, args=arguments)
    process.start()
    return process


def joined(processes):
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_a_lock_is_removed_and_an_exception_passes(store):
    key = entry().key

    def failing():
        with store.lock(key):
            assert names(store) == [f"locks/{key}.lock"]
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        failing()
    assert names(store) == []
    with store.lock(key), store.lock(entry(batch=1).key):
        assert store.clear() == 0
        assert len(names(store)) == 2  # both are in use
    assert names(store) == []


def test_an_error_of_the_one_who_is_told_is_no_error_of_the_lock(store):
    def waiting():
        raise BrokenPipeError("nobody reads")

    process = start(cases.search, store.folder, 1.0)
    await_log(store, "searches")
    with pytest.raises(BrokenPipeError, match="nobody"), store.lock(entry().key, waiting):
        pass
    joined([process])


@pytest.mark.distributed
def test_of_three_processes_one_searches_and_the_others_wait_and_read(store):
    processes = [start(cases.search, store.folder, 0.4, str(i)) for i in range(3)]
    joined(processes)
    said = log(store)
    assert sum(line.startswith("searches") for line in said) == 1
    assert sum(line.startswith("reads") for line in said) == 2
    assert names(store) == [f"{entry().key}.json"]


@pytest.mark.distributed
def test_a_killed_holder_frees_the_lock_and_the_next_one_searches(store):
    first = start(cases.search, store.folder, 600, "first")
    await_log(store, "searches first")
    others = [start(cases.search, store.folder, 0.1, str(i)) for i in range(2)]
    await_log(store, "waits 0")
    await_log(store, "waits 1")
    assert not any("searches" in line and "first" not in line for line in log(store))
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    joined(others)
    said = log(store)
    assert sum(line.startswith("searches") for line in said) == 2  # the killed one and another
    assert sum(line.startswith("reads") for line in said) == 1
    assert sum(line.startswith("waits") for line in said) == 2
    assert names(store) == [f"{entry().key}.json"]


@pytest.mark.distributed
def test_a_lock_that_is_removed_still_excludes(store):
    """Many short holders that store nothing: each removes the file that the others wait for."""
    processes = [start(_fail_often, store.folder, str(i)) for i in range(3)]
    joined(processes)
    said = log(store)
    assert len(said) == 3 * 2 * 15
    for begins, ends in zip(said[::2], said[1::2], strict=True):
        assert begins == ends.replace("ends", "begins")
    assert names(store) == []


def _fail_often(folder, mark):
    for turn in range(15):
        cases.fail(folder, f"{mark}.{turn}")


def test_what_a_killed_process_left_is_swept(store):
    process = start(cases.search, store.folder, 600)
    await_log(store, "searches")
    left = store.folder / "locks" / f"{entry().key}.lock"
    os.utime(left, (time.time() - 3600,) * 2)
    with store.lock(entry(batch=1).key):
        pass
    assert left.exists()  # in use, however old it is
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    temporary = store.folder / f".{entry().key}.json.{'0' * 32}.tmp"
    for path in (temporary, store.folder / ".mine"):
        path.write_text("half")
        os.utime(path, (time.time() - 7200,) * 2)
    assert left.exists()
    with store.lock(entry(batch=1).key):
        pass
    assert names(store) == [".mine"]


@pytest.mark.distributed
def test_sigkill_while_writing_leaves_whole_files_alone(store):
    """Kills at 60 moments, from a fork each: what is there afterwards is an entry, or nothing."""
    rng, locks, entries = random.Random(0), 0, 0
    for turn in range(60):
        process = os.fork()
        if process == 0:
            try:
                _write_on(store)
            finally:
                os._exit(1)
        time.sleep(0.004 + 0.012 * rng.random())
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        files = set(names(store))
        assert files <= {f"{entry().key}.json", f"locks/{entry().key}.lock"}, turn
        locks += f"locks/{entry().key}.lock" in files
        if f"{entry().key}.json" in files:
            entries += 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert store.read(entry().key).lr in (1e-3, 2e-3)
    assert entries > 20
    assert locks > 5  # so that many were killed on the way
    with store.lock(entry().key):  # freed, whatever the last one did
        store.write(entry())
    assert names(store) == [f"{entry().key}.json"]


def _write_on(store):
    both = [entry(lr=lr) for lr in (1e-3, 2e-3)]
    while True:
        for one in both:
            with store.lock(one.key):
                store.write(one)


def test_an_entry_holds_no_code(store):
    store.write(entry())
    assert isinstance(json.loads(store.path(entry().key).read_bytes()), dict)
    assert set(Entry.__dataclass_fields__) < set(json.loads(store.path(entry().key).read_bytes()))
