"""Does the command end as it should, and does nobody but this machine reach the page?"""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from lightning_diag.cli import app

COMMAND = [sys.executable, "-m", "lightning_diag.cli", "monitor"]
WAIT = 60  # seconds; machines are shared
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def start():
    """Starts the command, and sees to it that it ends with the test."""
    started = []

    def begin(*arguments, **options):
        words = [*COMMAND, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "xterm"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        started.append(subprocess.Popen(words, env=environment, **options))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def get(address, **headers):
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers=headers), timeout=WAIT
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def own_addresses():
    """Addresses of this machine other than the loopback that is meant."""
    import psutil

    found = {"127.0.0.2"}
    for interface in psutil.net_if_addrs().values():
        found |= {one.address for one in interface if one.family == socket.AF_INET}
    return found - {"127.0.0.1"}


def test_it_serves_this_machine_alone_until_it_is_interrupted(folder, start):
    served = start(folder.begin().train(9, 50).path)
    line = served.stdout.readline()
    assert re.fullmatch(r"live page: http://127\.0\.0\.1:\d+/\n", line)
    address = line.split()[-1]
    port = int(address.rstrip("/").rpartition(":")[2])
    assert get(f"{address}api/state") == 200
    assert get(f"{address}api/state", Host="evil.example") == 400
    assert get(f"{address}api/state", Origin="http://evil.example") == 403
    for other in own_addresses():
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((other, port), timeout=5)
    # a page that is open keeps its connection
    with socket.create_connection(("127.0.0.1", port)):
        served.send_signal(signal.SIGINT)
        said = served.communicate(timeout=WAIT)
    assert (served.returncode, *said) == (0, "", "")


def test_a_port_that_is_taken_gives_one_line(folder, start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = start(folder.begin().path, "--port", port)
        said, error = refused.communicate(timeout=WAIT)
    assert refused.returncode == 2
    assert said == ""
    assert (
        error.strip()
        .splitlines()[-1]
        .endswith(f"Port {port} cannot be used: Address already in use.")
    )
    assert len(error.strip().splitlines()) == 1


def read_all(master, until, process):
    """What a terminal was told, until it says `until` or its process has ended."""
    text, deadline = "", time.monotonic() + WAIT
    while until not in text and time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                text += os.read(master, 65536).decode(errors="replace")
            except OSError:
                break
        elif process.poll() is not None:
            break
    return text


def test_a_terminal_keeps_up_until_it_is_interrupted(folder, start):
    folder.begin().train(9, 50)
    master, slave = pty.openpty()
    try:
        options = {"stdin": slave, "stdout": slave, "stderr": slave}
        shown = start(
            folder.path, "--terminal", "--interval", "0.2", start_new_session=True, **options
        )
        assert "49 of" in read_all(master, "49 of", shown)
        folder.train(59, 80)
        assert "79 of" in read_all(master, "79 of", shown)
        shown.send_signal(signal.SIGINT)
        rest = read_all(master, "never said", shown)
        assert shown.wait(WAIT) == 0
        assert "Traceback" not in rest
        assert "Aborted" not in rest
    finally:
        os.close(slave)
        os.close(master)


def test_a_terminal_is_left_when_the_run_has_ended(folder, start):
    folder.begin(status="finished").train(9, 50)
    master, slave = pty.openpty()
    try:
        options = {"stdin": slave, "stdout": slave, "stderr": slave}
        shown = start(folder.path, "--terminal", **options)
        assert "ended" in read_all(master, "ended", shown)
        assert shown.wait(WAIT) == 0
    finally:
        os.close(slave)
        os.close(master)


def test_a_pipe_gets_one_drawing(folder):
    folder.begin().train(9, 50)
    result = CliRunner().invoke(app, ["monitor", str(folder.path), "--terminal"])
    assert result.exit_code == 0
    assert result.stdout.count("running") == 1
    assert "\x1b" not in result.stdout


def test_a_picture_of_a_run_and_of_a_sweep(folders, tmp_path):
    import io

    from PIL import Image

    sizes = {}
    for number in range(2):
        folders(str(number)).begin(status="finished").train(9, 50)
    for name, path in (("run", folders("0").path), ("sweep", folders("0").path.parent)):
        target = tmp_path / f"{name}.png"
        result = CliRunner().invoke(app, ["monitor", str(path), "--static", str(target)])
        assert result.exit_code == 0
        assert result.stdout == f"picture: {target}\n"
        sizes[name] = Image.open(io.BytesIO(target.read_bytes())).size
        assert target.read_bytes().startswith(PNG)
    # loss and gradients below one another; of two runs beside one another, and what is of both
    assert sizes["run"][1] < sizes["sweep"][1]
    assert sizes["run"][0] < sizes["sweep"][0]


def test_the_picture_of_a_sweep_shows_the_gravest_side_by_side(folders, monkeypatch):
    from lightning_diag.monitor import picture as home
    from lightning_diag.monitor.watched_runs import WatchedRuns

    for number in range(6):
        folder = folders(str(number)).begin(status="finished").train(9, 400)
        if number == 5:
            for step in range(409, 800, 10):
                row = {"step": step, "time": 1000.0 + step, "count": 100, "tensors": 2}
                silent = {"component": "head", "l2": None, "count": 0, "tensors": 0, "missing": 2}
                folder.write("grad", row | {"component": "encoder", "l2": 0.5}, row | silent)
    drawn = []

    def seen(spec):
        drawn.append(spec)
        return make(spec)

    make = home.chart_png
    monkeypatch.setattr(home, "chart_png", seen)
    assert home.picture(WatchedRuns(folders("0").path.parent)).startswith(PNG)
    titles = [
        spec["title"] if isinstance(spec["title"], str) else spec["title"]["text"] for spec in drawn
    ]
    shown = [f"Run {number}" for number in (0, 1, 2, 5)]
    assert titles == ["Losses of all runs", "Findings of each run", *shown, *shown]
    assert [spec["title"]["subtitle"][0] for spec in drawn[2::4]] == [
        "Loss and learning rate",
        "Gradient norm by component",
    ]
    assert "5: 1 critical, 0 warnings" in drawn[1]["description"]
    assert "4: 0 critical, 0 warnings" in drawn[1]["description"]


def test_names_that_no_picture_can_hold(folders, tmp_path):
    for number in range(2):
        names = ("enc\x00oder", "he\x1bad")
        folders(f"{number}\x07").begin(status="finished").train(9, 50, names=names)
    for path in (folders("0\x07").path, folders("0\x07").path.parent):
        # what cannot be drawn ends the whole process
        command = [*COMMAND, str(path), "--static", str(tmp_path / "a.png")]
        assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", "0"], "`--interval` must be positive, got 0."),
        (["--port", "70000"], "`--port` must lie in 0 to 65535, got 70000."),
        (["--static", "x.jpg"], "`path` must end in .png, got x.jpg."),
        (["--static", "x.png"], "A picture needs a run that has measured something, got"),
        (["--static", "x.png", "--terminal"], "Only one of `--static` and `--terminal`"),
    ],
)
def test_what_cannot_be_wanted_is_said_in_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["monitor", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
