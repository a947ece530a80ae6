import re
import shutil
import subprocess

import pytest

from lightning_diag.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=10000", "--enable-logging=stderr", "--window-size=1200,2400"),
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path"),
]


def drawn(page, profile):
    flags = [*FLAGS, f"--user-data-dir={profile}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_scripts_replace_the_pictures_by_charts(write_run, hostile_rows, tmp_path):
    report = write_report(write_run(hostile_rows))
    dom, console = drawn(report.files["report.html"], tmp_path / "profile")
    assert console == []
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.S)
    assert body.count("<svg") == 5
    assert "data:image" not in body
    assert "began at step" in body
    assert "optimizer step" in body
    assert "alert(1)" in body  # as text
    assert not re.search(r"<img[^>]*onerror", body)
