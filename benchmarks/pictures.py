"""The pictures of README.md: a real run with a planted fault, live and reported, in a browser.

Trains ``captions_skipped_decoder``, whose text decoder is never called; takes the live page while
it trains, and the report when it is done, as far as the upper findings and charts go.

Run from a checkout: ``python -m benchmarks.pictures [--run FOLDER] [--into FOLDER]``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HERE = Path(__file__).parent
EXPERIMENT = "captions_skipped_decoder"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COMMAND = [sys.executable, "-m", "lightning_diag.cli"]
WIDTH, HEIGHT = 1100, 1450  # pixels of the page
LARGEST = 300_000  # bytes
LIVE_AT = 60  # % of the run; findings stand and curves have a shape
PATIENCE, DRAWING = 1800, 180  # s for training, and for a page; a machine may be busy
_Answer = TypeVar("_Answer")
# where to cut: below what ends last within the height, but not before the first chart has ended
CHART = """Math.min(...[...document.querySelectorAll("svg")].map(x => x.getBoundingClientRect())
    .filter(x => x.height > 100).map(x => x.bottom))"""
END = f"""Math.max(...[...document.querySelectorAll("article, .card, svg, dl")]
    .map(x => x.getBoundingClientRect().bottom)
    .filter(x => x < Math.max({HEIGHT}, {CHART} + 40))) + 14"""


def browser_path() -> str:
    """Where Chromium is.

    Raises:
        SystemExit: None is on the path.
    """
    for name in BROWSERS:
        found = shutil.which(name)
        if found is not None:
            return found
    sys.exit(
        f"Pictures need a browser on the PATH, one of {', '.join(BROWSERS)}; got none. "
        "On Debian: apt-get install chromium."
    )


@contextmanager
def browser() -> "Iterator[Browser]":
    """A headless browser that opens light pages of one width."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("Pictures need Playwright: pip install -e '.[all,dev]'.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--hide-scrollbars"]
        )
        yield chromium
        chromium.close()


def opened(chromium: "Browser", url: str) -> "Page":
    """A light page of that address."""
    page = chromium.new_page(
        viewport={"width": WIDTH, "height": 2 * HEIGHT},
        device_scale_factor=1.5,
        color_scheme="light",
    )
    page.set_default_timeout(1000 * DRAWING)
    page.goto(url)
    return page


def shot(page: "Page", file: Path) -> None:
    """The upper part of a page, as a PNG of few colours.

    Raises:
        SystemExit: There is no chart in view, or the picture is too large for a repository.
    """
    from PIL import Image
    from playwright.sync_api import TimeoutError as NotDrawn

    try:
        page.wait_for_function(f"{CHART} < Infinity")
    except NotDrawn:
        sys.exit(f"A picture must have a chart in it, got none in {page.url}.")
    page.wait_for_timeout(2000)
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": page.evaluate(END)}
    whole = Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")  # type: ignore[arg-type]
    whole.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    size = file.stat().st_size
    print(f"picture: {file} ({whole.width} x {whole.height}, {size // 1000} kB)", flush=True)
    if size >= LARGEST:
        sys.exit(f"A picture must have less than {LARGEST // 1000} kB, got {size // 1000}.")


@contextmanager
def started(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs beside this one, and is ended with it."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def waited(
    question: Callable[[], _Answer | None], process: subprocess.Popen[bytes], log: Path
) -> _Answer:
    """The first answer of a question that is asked again and again.

    Raises:
        SystemExit: The process ended before, or it took too long.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        answer = question()
        if answer:
            return answer
        if process.poll() is not None:
            break
        time.sleep(0.5)
    sys.exit(f"There was nothing to take a picture of; the process said:\n{_end(log)}")


def _end(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def address(log: Path) -> str | None:
    """What the monitor announces, once it has."""
    said = log.read_text(encoding="utf-8").partition("live page: ")[2]
    return said.split()[0] if "\n" in said else None


def live(
    chromium: "Browser", run: Path, file: Path, training: subprocess.Popen[bytes] | None
) -> None:
    """The picture of the live page: while it trains, where something trains."""
    log = run.parent / "monitor.log"
    with started(["monitor", str(run), "--interval", "1"], log) as monitor:
        page = opened(chromium, waited(lambda: address(log), monitor, log))
        if training is not None:
            bar = page.locator("#bar")
            waited(
                lambda: float(bar.get_attribute("aria-valuenow") or 0) >= LIVE_AT,
                training,
                run.parent / "train.log",
            )
        shot(page, file)


def main() -> None:
    """Train, look, and write both pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--run", type=Path, help="a run that is there, and is not trained again")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the pictures")
    chosen = parser.parse_args()
    browser_path()  # before a minute of training
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        run = chosen.run or Path(scratch) / EXPERIMENT
        page, report = chosen.into / "page.png", chosen.into / "report.png"
        if chosen.run is None:
            log = Path(scratch) / "train.log"
            print(f"training {EXPERIMENT} (some two minutes)", flush=True)
            order = ["train", f"experiment={EXPERIMENT}", f"run_dir={run}"]
            with started(order, log) as training:
                waited(lambda: (run / "run.json").exists(), training, log)
                live(chromium, run, page, training)
                if training.wait() != 0:
                    sys.exit(f"The training failed:\n{_end(log)}")
        else:
            run = shutil.copytree(run, Path(scratch) / run.name)
            live(chromium, run, page, None)
        # the page names the run as it was named
        order = ["report", run.name, "--no-fail"]
        subprocess.run([*COMMAND, *order], check=True, cwd=run.parent)
        shot(opened(chromium, (run / "analysis" / "report.html").as_uri()), report)


if __name__ == "__main__":
    main()
