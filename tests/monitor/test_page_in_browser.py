"""The live page in a real browser: drawn, moving, quiet, and safe from what runs are called."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest

from lightning_diag.monitor import TrainingMonitor
from tests.monitor.conftest import BROWSER, Folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path"),
]

HOSTILE = (
    '<img src=x onerror="document.title=`broken in`"><script>document.title="broken in"</script>'
)
WAIT = 60_000  # ms; machines are shared


@pytest.fixture
def serve():
    """Serves a folder in a thread, and gives the page's address."""

    def start(path, interval=0.3):
        address, known = [], threading.Event()

        def announce(url):
            address.append(url)
            known.set()

        # ends with the process that tests
        arguments = {"interval": interval, "announce": announce}
        threading.Thread(target=TrainingMonitor(path).live, kwargs=arguments, daemon=True).start()
        assert known.wait(60)
        return address[0]

    return start


@pytest.fixture
def browse():
    """Opens pages, and sees to it that nothing is said on the console."""
    from playwright.sync_api import sync_playwright

    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        def open_page(url, **options):
            page = browser.new_page(**options)
            page.set_default_timeout(WAIT)
            page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: said.append(f"error: {error}"))
            page.on("request", lambda request: said.extend(_elsewhere(request.url, url)))
            page.goto(url)
            return page

        yield open_page
        browser.close()
    assert said == []


def _elsewhere(asked, home):
    return [] if asked.startswith((home, "data:", "blob:")) else [f"asked for {asked}"]


def drawn(page, *names):
    for name in names:
        # charts are drawn where they are seen
        page.wait_for_selector(f"#chart-{name}", state="attached")
        page.evaluate("id => document.getElementById(id).scrollIntoView()", f"chart-{name}")
        page.wait_for_selector(f"#chart-{name} svg")


def test_charts_and_numbers_of_a_run_are_shown(folder, serve, browse):
    folder.begin().train(9, 100)
    page = browse(serve(folder.path))
    drawn(page, "training", "gradient_flow")
    assert page.title() == "Training: run"
    assert page.inner_text("#headline") == "Training: nothing wrong so far"
    numbers = page.inner_text("#numbers")
    assert "99 of 100" in numbers
    assert "0.1" in numbers
    axes = page.inner_html("#chart-gradient_flow")
    assert "optimizer step" in axes
    assert "l2 norm of the gradient" in axes
    assert page.get_attribute("#bar", "aria-valuenow") == "100"
    folder.begin(planned=400)
    page.wait_for_function(
        "document.querySelector('#done').textContent.startsWith('25 % done, about')"
    )
    assert page.get_attribute("#bar", "aria-valuetext") == page.inner_text("#done")
    assert page.inner_text("#done").endswith("left")


def test_the_page_keeps_up_with_what_is_written(folder, serve, browse):
    page = browse(serve(folder.path))
    page.wait_for_function("document.querySelector('#headline').textContent === 'Waiting'")
    folder.begin().train(9, 30)
    page.wait_for_function("document.querySelector('#numbers').innerText.includes('29 of 100')")
    drawn(page, "gradient_flow")
    before = page.inner_html("#chart-gradient_flow")
    folder.train(39, 80)
    page.wait_for_function("document.querySelector('#numbers').innerText.includes('79 of 100')")
    page.wait_for_function(
        "before => document.querySelector('#chart-gradient_flow').innerHTML !== before", arg=before
    )
    shutil.rmtree(folder.path)
    page.wait_for_function("document.querySelector('#headline').textContent.startsWith('Gone')")


def test_a_finding_appears_with_severity_step_and_what_to_try(folder, serve, browse):
    folder.begin().train(9, 100)
    page = browse(serve(folder.path))
    page.wait_for_selector("#findings p")
    assert page.inner_text("#findings") == "None."
    for step in range(109, 200, 10):
        row = {"step": step, "time": 1000.0 + step, "count": 100, "tensors": 2, "missing": 0}
        silent = {"component": "head", "l2": None, "count": 0, "tensors": 0, "missing": 2}
        folder.write("grad", row | {"component": "encoder", "l2": 0.5}, row | silent)
    page.wait_for_selector("#findings .critical")
    card = page.inner_text("#findings .critical")
    assert "Dead component" in card
    assert "since step 109" in card
    assert "Try:" in card
    assert page.get_attribute("#findings", "aria-live") == "polite"
    page.wait_for_function("document.title.startsWith('Training')")
    assert "critical" in page.inner_text("#headline")


def test_names_are_text_and_never_markup(tmp_path, serve, browse):
    folder = Folder(tmp_path / HOSTILE.replace("/", "_"))
    long = "x" * 10_000
    folder.begin(stop_reason=HOSTILE).train(9, 100, names=(HOSTILE, long, "../../etc/passwd"))
    page = browse(serve(folder.path), viewport={"width": 900, "height": 800})
    drawn(page, "gradient_flow")
    assert "broken in" not in page.title().partition(": ")[0]
    assert page.title().startswith("Training: <img")
    assert page.locator("#head img, #findings img, #charts img").count() == 0
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_every_window_and_ground(folder, serve, browse, scheme, width):
    folder.begin().train(9, 100)
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page = browse(serve(folder.path), **options)
    drawn(page, "training", "gradient_flow")
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground[4:-1].split(","))
    assert (brightness > 600) == (scheme == "light")
    box = page.locator("#chart-gradient_flow svg").bounding_box()
    assert box["x"] + box["width"] <= width


def test_a_sweep_is_shown_side_by_side_and_by_keyboard(folders, serve, browse):
    for number in range(3):
        folders(str(number)).begin().train(9, 50 + 10 * number)
    page = browse(serve(folders("0").path.parent))
    drawn(page, "of-all", "training")
    assert page.locator("#runs tr").count() == 3
    buttons = page.locator("#runs button")
    assert [buttons.nth(n).inner_text() for n in range(3)] == ["0", "1", "2"]
    assert "49 of 100" in page.inner_text("#numbers")
    buttons.nth(0).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#numbers').innerText.includes('59 of 100')")
    # what was chosen keeps the focus when the table is written anew
    page.wait_for_timeout(1000)
    assert page.evaluate("document.activeElement.innerText") == "1"
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"


def test_runs_that_are_ticked_are_shown_beside_the_chosen_one(folders, serve, browse):
    for number in range(3):
        folders(str(number)).begin().train(9, 50 + 10 * number)
    wide = {"viewport": {"width": 1600, "height": 900}}
    page = browse(serve(folders("0").path.parent), **wide)
    drawn(page, "of-all", "training")
    assert page.locator("#charts figure").count() == 2
    box = page.get_by_role("checkbox", name="compare 2")
    box.focus()
    page.keyboard.press("Space")
    drawn(page, "training-1", "gradient_flow-1")
    left, right = (page.locator(f"#chart-{name}") for name in ("training", "training-1"))
    assert left.bounding_box()["y"] == right.bounding_box()["y"]
    assert left.bounding_box()["x"] < right.bounding_box()["x"]
    assert [one.locator("small").inner_text() for one in (left, right)] == ["run 0", "run 2"]
    assert right.locator(".chart").get_attribute("aria-label").startswith("run 2: ")
    assert page.get_by_role("checkbox", name="compare 0").is_disabled()
    # and what was found in each
    assert page.inner_text("#findings").split("\n\n") == ["run 0", "None.", "run 2", "None."]
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#chart-training-1", state="detached")
    assert page.inner_text("#findings") == "None."


def test_a_run_of_a_sweep_that_is_killed_torn_or_deleted_says_so(folders, serve, browse):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for number in range(4):
        folders(str(number)).begin(pid=dead.pid if number == 1 else None).train(9, 50)
    with (folders("2").path / "records" / "grad.jsonl").open("a") as stream:
        stream.write('{"step": 59, "comp\n')
    page = browse(serve(folders("0").path.parent))
    drawn(page, "of-all")
    shutil.rmtree(folders("3").path)
    states = "[...document.querySelectorAll('#runs tr')].map(row => row.children[2].innerText)"
    page.wait_for_function(f"{states}.join() === 'Training,Killed,Training,Gone'")
    page.get_by_role("button", name="2").click()
    page.wait_for_function("document.querySelector('#lead').innerText.includes('not be read: 1')")
    page.get_by_role("button", name="3").click()
    page.wait_for_function("document.querySelector('#headline').innerText === 'Gone'")


def test_two_hundred_runs_are_shown_and_only_the_chosen_ones_charts(folders, serve, browse):
    for number in range(200):
        folders(str(number)).begin(status="finished").train(9, 30)
    page = browse(serve(folders("0").path.parent))
    page.wait_for_function("document.querySelectorAll('#runs tr').length === 200")
    page.wait_for_function("!document.querySelector('#runs').innerText.includes('Reading')")
    drawn(page, "of-all", "training")
    assert "smallest loss" in page.inner_text("#together figcaption")
    assert page.locator("#charts figure").count() == 2
    page.get_by_role("button", name="150", exact=True).click()
    page.wait_for_function("document.querySelector('#title').innerText === '150'")


def test_charts_stay_where_they_are_and_are_drawn_only_where_seen(folder, serve, browse):
    folder.begin().train(9, 50)
    for step in (9, 19):
        folder.write("hardware", {"step": step, "time": 1e3 + step, "samples_per_second": 5.0})
        folder.write("latent", {"step": step, "time": 1e3 + step, "latent_std": 1.0, "side": "x"})
    page = browse(serve(folder.path), viewport={"width": 900, "height": 700})
    asked = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page.wait_for_selector("#chart-training svg")
    assert page.locator("#chart-hardware svg").count() == 0
    drawn(page, "hardware")
    page.wait_for_timeout(1000)
    where, look = (
        page.evaluate("scrollY"),
        page.evaluate("document.querySelector('#foot').innerText"),
    )
    before = page.inner_html("#chart-hardware svg")
    assert where > 300
    # the rows of other charts change nothing here, and charts out of sight are not asked for
    asked.clear()
    folder.train(59, 80)
    page.wait_for_function("document.querySelector('#numbers').innerText.includes('79 of 100')")
    page.wait_for_timeout(1000)
    assert not {"training", "hardware"} & set(asked)
    assert page.inner_html("#chart-hardware svg") == before
    folder.write("hardware", {"step": 29, "time": 1029.0, "samples_per_second": 50.0})
    page.wait_for_function(
        "before => document.querySelector('#chart-hardware svg').innerHTML !== before", arg=before
    )
    assert abs(page.evaluate("scrollY") - where) <= 2
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    assert "training" in asked
    assert look


def test_an_empty_chart_is_never_seen_while_it_is_drawn_anew(folder, serve, browse):
    folder.begin().train(9, 50)
    page = browse(serve(folder.path))
    drawn(page, "training")
    page.evaluate("""() => {
        window.seen = [];
        const place = document.querySelector('#chart-training .chart');
        new MutationObserver(() => window.seen.push(place.querySelectorAll('svg').length))
            .observe(place, { childList: true });
    }""")
    folder.train(59, 80)
    page.wait_for_function("window.seen.length > 0")
    assert set(page.evaluate("window.seen")) == {1}


def test_wide_windows_have_two_columns_of_charts(folder, serve, browse):
    folder.begin().train(9, 100)
    page = browse(serve(folder.path), viewport={"width": 1280, "height": 900})
    drawn(page, "training", "gradient_flow")
    left, right = (
        page.locator(f"#chart-{x}").bounding_box() for x in ("training", "gradient_flow")
    )
    assert abs(left["y"] - right["y"]) <= 1
    assert left["x"] + left["width"] <= right["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(folders, serve, browse, scheme):
    """The contrast that WCAG 2.2 asks of text, 4.5, for every text there is on the page."""
    folders("1").begin().train(9, 100)
    sick = folders("0").begin(stop_reason="because").train(9, 100)
    for step in range(109, 200, 10):
        row = {"step": step, "time": 1000.0 + step, "count": 100, "tensors": 2, "missing": 0}
        silent = {"component": "head", "l2": None, "count": 0, "tensors": 0, "missing": 2}
        sick.write("grad", row | {"component": "encoder", "l2": 0.5}, row | silent)
    page = browse(serve(sick.path.parent), color_scheme=scheme)
    drawn(page, "of-all", "training", "gradient_flow")
    page.wait_for_selector("#findings .critical")
    pale = page.evaluate(CONTRASTS)
    assert len(pale) > 20
    assert {text: ratio for text, ratio in pale if ratio < 4.5} == {}


CONTRASTS = """() => {
    const parts = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = (colour) => {
        const [r, g, b] = parts(colour).map((x) => x / 255)
            .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            const [, , , alpha = 1] = parts(colour);
            if (alpha > 0) return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    const found = [];
    for (const node of document.querySelectorAll('body *')) {
        const text = [...node.childNodes].filter((one) => one.nodeType === 3 && one.data.trim());
        if (!text.length || node.closest('script') || !node.getClientRects().length) continue;
        const style = getComputedStyle(node);
        const ink = node.closest('svg') ? style.fill : style.color;
        const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
        found.push([text[0].data.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
    }
    return found;
}"""


def test_everything_has_a_name_for_those_who_listen(folder, serve, browse):
    folder.begin().train(9, 100)
    page = browse(serve(folder.path))
    drawn(page, "training", "gradient_flow")
    for chart in page.locator("[role=img]").all():
        assert len(chart.get_attribute("aria-label")) > 20
    for section in page.locator("section").all():
        assert page.locator(f"#{section.get_attribute('aria-labelledby')}").count() == 1
    assert page.locator("h1").count() == 1
    assert page.get_attribute("html", "lang") == "en"


TRAINING = """
    import sys, time
    import torch
    from torch import nn
    from lightning_diag import RunLogger, suite
    from lightning_diag.lightning import LightningModule, Trainer

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(4, 16), nn.Linear(16, 1)

        def training_step(self, batch, _):
            time.sleep(0.02)
            loss = (self.head(self.encoder(batch[0]).tanh()) - batch[0][:, :1]).square().mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    data = torch.utils.data.TensorDataset(torch.randn(64, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer = Trainer(
        accelerator="cpu", max_steps=100_000, max_epochs=-1, logger=RunLogger(sys.argv[1]),
        callbacks=suite("cheap"), log_every_n_steps=5, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )
    trainer.fit(Model(), loader)
"""


def test_numbers_move_while_a_real_training_runs_until_it_is_killed(tmp_path, serve, browse):
    page = browse(serve(tmp_path / "run"))
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(TRAINING))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    training = subprocess.Popen([sys.executable, script, tmp_path / "run"], env=environment)
    step = "Number(document.querySelector('dd')?.innerText.split(' ')[0].replaceAll(',', ''))"
    try:
        page.wait_for_function(f"{step} > 10")
        first = page.evaluate(step)
        page.wait_for_function(f"{step} > {first} + 20")
        drawn(page, "training", "hardware")
    finally:
        training.kill()
        training.wait()
    page.wait_for_function("document.querySelector('#headline').textContent.startsWith('Killed')")
