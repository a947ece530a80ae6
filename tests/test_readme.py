"""Is README.md true? All names are explained in it, and what it shows can be run as it stands."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_diag
from lightning_diag import (
    ActivationHealth,
    AttentionCapture,
    BlobMetrics,
    CollapseStop,
    ComponentProfiler,
    GradientHealth,
    HardwareMonitor,
    HealthAlerts,
    LatentStats,
    LRCache,
    RunLogger,
    UpdateRatio,
    WiringCheck,
)
from lightning_diag.callbacks.base import Diagnostic
from lightning_diag.lightning import LightningModule, Trainer
from lightning_diag.report import write_report
from lightning_diag.rules.registry import RULES
from lightning_diag.suites import SUITES
from tests.promises.networks import Classifier, TwoOptimizers, batches
from tests.strangers.projects import LENGTH, Autoencoder, Bert, digits, loader, sentences

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore")

EVERYWHERE = {"step", "epoch", "time", "attempt", "component"}
BROKEN_FROM = 12
CACHE = Path(gettempdir()) / "lightning_diag_test_readme"


def quoted(text: str) -> set[str]:
    """What stands between backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def first_cells(text: str) -> set[str]:
    """What stands between backticks in the first column of tables."""
    return quoted("\n".join(line.split("|")[1] for line in text.splitlines() if line[:1] == "|"))


def section(title: str) -> str:
    """The text below a heading of the second level."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


BLOCKS = {
    name: first_cells(text)
    for name, text in re.findall(
        r"<details><summary>The columns of (\w+)\.jsonl</summary>(.*?)</details>",
        section("What is in a run"),
        re.S,
    )
}
FILES = first_cells(section("What is in a run"))
CLASSES = [
    name
    for name in lightning_diag.__all__
    if isinstance(kind := getattr(lightning_diag, name), type) and issubclass(kind, Diagnostic)
]


class Pictures(Autoencoder):
    """Has hyper-parameters and numbers of its own; its loss is lost for good at some step."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.breaks = breaks

    def diagnostics(self) -> dict[str, object]:
        return {"width": 3, "weight": self.decoder[0].weight}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.breaks and self.global_step >= BROKEN_FROM else loss


class Miswired(Classifier):
    """A saturated sigmoid, a softmax too many, a cut graph, and a rate that moves nothing."""

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        scores = torch.sigmoid(100 * self.net(tokens)).detach() + self.net.head.bias
        return F.cross_entropy(scores.softmax(-1) + 0 * self.net.norm.bias.sum(), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-12)


def diagnostics(**options: dict[str, object]) -> list[Diagnostic]:
    """All of them, with everything on that adds rows; HealthAlerts last, since it reads others'."""
    made = {kind: {} for name in CLASSES if (kind := getattr(lightning_diag, name))}
    made.pop(HealthAlerts)
    made |= {
        GradientHealth: {"zeros_every": 1, "per_parameter": True, "histogram": True},
        WiringCheck: {},
        CollapseStop: {"every_n_steps": 1},
        HardwareMonitor: {"sample_seconds": 0.05, "flops_per_sample": 1e6, "peak_flops": 1e12},
        UpdateRatio: {"per_parameter": True, "every_n_steps": 2},
        ComponentProfiler: {"table": False, "count_every": 2},
        AttentionCapture: {"components": {"all": "*"}, "maps": 2},
        ActivationHealth: {"window": 1},
        LatentStats: {},
        BlobMetrics: {},
        LRCache: {"every_n_steps": None, "optimizer": 0, "apply": False, "cache_dir": CACHE},
        HealthAlerts: {"console": False},
    }
    return [
        kind(
            **{
                "every_n_steps": 5,
                "on_error": "raise",
                **arguments,
                **options.get(kind.__name__, {}),
            }
        )
        for kind, arguments in made.items()
    ]


def train(
    path: Path,
    model: LightningModule,
    data: DataLoader,
    watched: list[Diagnostic],
    **arguments: object,
) -> None:
    trainer = Trainer(
        **{
            "max_steps": 20,
            "limit_train_batches": 12,
            "limit_val_batches": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": RunLogger(path),
            "callbacks": watched,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            **arguments,
        }
    )
    trainer.fit(model, data, digits() if isinstance(model, Pictures) else None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A healthy run, one with attention, one that is lost, and two that are wired oddly."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    pair = {"pairs": {"body": ["net.body.0.weight", "net.body.3.weight"]}}
    attention = {
        "capture": {"first": "bert.bert.encoder.layer.0.attention.self"},
        "key_names": {"first": [f"word {place}" for place in range(LENGTH)]},
    }
    jobs = {
        "healthy": (partial(Pictures, breaks=False), digits(), {}, {"gradient_clip_val": 0.1}),
        "attention": (Bert, loader(*sentences()), {"AttentionCapture": attention}, {}),
        "lost": (
            partial(Pictures, breaks=True),
            digits(),
            {"CollapseStop": {"action": "rollback"}},
            {},
        ),
        "two": (TwoOptimizers, batches(12), {"BlobMetrics": pair}, {}),
        "miswired": (
            Miswired,
            batches(12),
            {"BlobMetrics": pair, "CollapseStop": {"action": "warn"}},
            {},
        ),
    }
    for name, (model, data, options, arguments) in jobs.items():
        train(folder / name, model(), data, diagnostics(**options), **arguments)
    write_report(folder / "attention")
    return [folder / name for name in jobs]


def keys_on_disk(runs: list[Path]) -> dict[str, set[str]]:
    """Every key of every file of rows."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for file in (run / "records").glob("*.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                found.setdefault(file.stem, set()).update(json.loads(line))
    del found["metrics"]
    return found


def unexplained(keys: set[str], documented: set[str]) -> Iterator[str]:
    for key in sorted(keys - EVERYWHERE):
        # key_3 is explained where key_1 is
        first = re.sub(r"^(key|mass|name)_\d+$", r"\1_1", key)
        if not {first, first.removesuffix("_nonfinite")} & documented:
            yield key


def test_every_key_of_every_row_is_explained(runs: list[Path]) -> None:
    found = keys_on_disk(runs)

    missing = {name: [*unexplained(keys, BLOCKS.get(name, set()))] for name, keys in found.items()}

    assert {name: keys for name, keys in missing.items() if keys} == {}
    # the runs show what they are there for
    assert {"attention_query", "component_internal", "health_alert"} <= found.keys()
    assert {"optimizer", "looks", "component_share"} <= found["wiring"]
    assert {"jumped", "first_never_changed"} <= found["update"]
    assert {"restored_step", "loss_nonfinite"} <= found["collapse"]


def test_no_file_of_rows_is_explained_that_none_writes(runs: list[Path]) -> None:
    assert keys_on_disk(runs).keys() == BLOCKS.keys()


def test_every_file_of_a_run_is_listed(runs: list[Path]) -> None:
    found = {
        re.sub(r"step_\d{6}", "step_XXXXXX", file.relative_to(run).as_posix())
        for run in runs
        for file in run.rglob("*")
        if file.is_file()
    }

    assert sorted(found - FILES) == []
    assert {"collapse_report.json", "results.json", "attention/step_XXXXXX.npz"} <= found
    assert {"config.yaml", "analysis/report.html", "analysis/attention_entropy.png"} <= found


@pytest.mark.parametrize("name", CLASSES)
def test_every_logged_key_is_explained(name: str) -> None:
    # those of a GPU or a gradient scaler too, which these runs cannot show
    kind = getattr(lightning_diag, name)

    assert [*unexplained(set(kind.logged), BLOCKS[kind.prefix])] == []


@pytest.mark.parametrize("name", CLASSES)
def test_every_diagnostic_is_in_the_table(name: str) -> None:
    assert name in first_cells(section("What it measures").partition("\n### ")[0])


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_described(name: str) -> None:
    lines = [line for line in README.splitlines() if line.startswith('| `"')]
    order = [re.findall(r"`\"?(\w+)\"?`", line) for line in lines]
    described = {}
    for own, *more in order:
        described[own] = {kind for holds in described.values() for kind in holds} | set(more)

    assert described[name] == set(SUITES[name])


@pytest.mark.parametrize("id", RULES)
def test_every_rule_is_described(id: str) -> None:
    assert id in first_cells(section("What it finds"))


def test_every_rule_that_is_described_is_there() -> None:
    assert first_cells(section("What it finds")) == RULES.keys()


def test_the_examples_are_python() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.S)

    assert examples
    for example in examples:
        ast.parse(example)


def test_what_it_links_to_is_there() -> None:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.S), re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    targets = set(re.findall(r"\]\(([^)\s]+)\)", README))
    inside = {target[1:] for target in targets if target.startswith("#")}
    files = {target for target in targets if not target.startswith(("#", "https://"))}

    assert inside
    assert inside - anchors == set()
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["page", "report"])
def test_the_pictures_are_small(name: str) -> None:
    file = ROOT / "benchmarks" / f"{name}.png"

    assert f"](benchmarks/{name}.png)" in README
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size < 300_000


def test_pictures_without_a_browser_are_refused(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "benchmarks.pictures"], tmp_path, PATH=str(tmp_path))

    assert done.returncode == 1
    assert "Pictures need a browser on the PATH" in done.stderr
    assert "apt-get install chromium" in done.stderr


def test_every_command_is_described_and_there() -> None:
    from typer.main import get_command

    from lightning_diag.cli import app

    there = set(get_command(app).commands)
    table = section("The command")
    described = {word for cell in first_cells(table) for word in re.findall(r"^[\w-]+", cell)}
    named = set(re.findall(r"lightning-diag ([a-z][\w-]*)", README))

    assert there - described == set()
    assert named - there == set()


def test_every_target_of_make_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))

    assert set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", README, re.M)) <= targets
    assert targets <= set(re.findall(r"make ([a-z]+) ", makefile)) | {"help"}


@pytest.mark.parametrize("name", sorted(set(SUITES["full"])))
def test_costs_are_those_that_were_measured(name: str) -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    line = next(line for line in section("What it measures").splitlines() if f"| `{name}`" in line)
    own, share = [cell.strip() for cell in line.split("|")][-3:-1]

    assert re.search(rf"\| {name} +\| [^|]+\| {re.escape(own)} +\|", results)
    assert f"{name} {share.replace(' ', '')}" in results


# ---- as a stranger would ----


def run(
    command: list[str], folder: Path, home: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a folder, by the code of `home`."""
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_the_script_runs_and_its_fault_is_found(tmp_path: Path) -> None:
    script = re.search(r"```python\n(import torch\n.*?)```", section("In your own project"), re.S)
    assert script
    short = script[1].replace("max_epochs=100", "max_epochs=5")
    assert short != script[1]
    (tmp_path / "mine.py").write_text(short, encoding="utf-8")
    trained = run([sys.executable, "mine.py"], tmp_path)
    assert trained.returncode == 0, trained.stderr

    command = [sys.executable, "-m", "lightning_diag.cli", "report", "runs/mine"]
    reported = run(command, tmp_path)

    assert reported.returncode == 3, reported.stderr
    assert "Unoptimized parameter: encoder" in trained.stdout + trained.stderr
    assert "Unoptimized parameter: encoder" in reported.stdout
    assert "96.2%" in reported.stdout
    assert (tmp_path / "runs/mine/analysis/report.html").is_file()


# lines of the walk-through, and what stands before them in the files that they go into
PLACES = (
    ("lightning_diag/__init__.py", 4, "AttentionCapture as AttentionCapture\n"),
    ("lightning_diag/__init__.py", 4, '"lightning_diag.callbacks.attention_capture",\n'),
    ("lightning_diag/__init__.py", 4, '    "AttentionCapture",\n'),
    ("tests/promises/cases.py", 4, "    AttentionCapture,\n"),
    ("tests/promises/cases.py", 4, "\nDIAGNOSTICS = {\n"),
    ("README.md", 0, "| `AttentionCapture` | Where does attention go, head by head?"),
    ("README.md", 0, "| `records/metrics.jsonl` |"),
    ("lightning_diag/rules/diagnosis.py", 0, "import outputs as outputs\n"),
    ("lightning_diag/rules/causal_order.py", 4, "    # settings\n"),
    ("README.md", 0, "| `overfitting` |"),
    ("tests/faults/trial.py", 4, "    AttentionCapture,\n"),
    ("tests/faults/trial.py", 8, '        LatentStats(every_n_steps=10, on_error="raise"),\n'),
)


def lines_to_add() -> list[str]:
    """The lines of the walk-through for files that are there, in the order of `PLACES`."""
    text = section("Contributing")
    own = "`(?:BatchRepeats|records/repeats.jsonl|repeated_samples)`"
    rows = re.findall(rf"^\| {own} \|.*$", text, re.M)
    table = re.findall(rf"^\| (?!{own}).* \| `([^`]+)` \|$", text, re.M)
    return [*table[:5], *rows[:2], *table[5:7], *rows[2:], *table[7:]]


def stranger(folder: Path) -> list[str]:
    """A copy of the checkout to which the walk-through was applied; the files that it brought."""
    for name in ("lightning_diag", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    block = r"<summary><code>([\w/.]+)</code></summary>\s+```\w+\n(.*?)```"
    brought = re.findall(block, section("Contributing"), re.S)
    for name, code in brought:
        assert not (folder / name).exists(), name
        (folder / name).write_text(code, encoding="utf-8")
    for (name, indent, before), line in zip(PLACES, lines_to_add(), strict=True):
        text = (folder / name).read_text(encoding="utf-8")
        assert before in text, (name, before)
        head, _, rest = text.partition(before)
        if not before.endswith("\n"):
            ending, _, rest = rest.partition("\n")
            before += ending + "\n"
        added = head + before + " " * indent + line + "\n" + rest
        (folder / name).write_text(added, encoding="utf-8")
    columns = re.search(r"```markdown\n.*?(<details>.*?</details>)\n```", README, re.S)
    assert columns
    text = (folder / "README.md").read_text(encoding="utf-8")
    first = "<details><summary>The columns of grad.jsonl"
    (folder / "README.md").write_text(text.replace(first, f"{columns[1]}\n\n{first}"))
    return [name for name, _ in brought]


@pytest.mark.slow
def test_the_walk_through_adds_a_diagnostic_a_rule_and_a_fault(tmp_path: Path) -> None:
    brought = stranger(tmp_path)
    files = [name for name in brought if name.endswith(".py")]
    assert len(brought) == 8

    python = [sys.executable, "-m"]
    chosen = ["BatchRepeats", "batch_repeats", "repeated_samples", "repeats.py", "yaml"]
    for command in (
        ["ruff", "check", "--no-cache", *files],
        ["ruff", "format", "--check", "--no-cache", *files],
        ["pytest", "-q", "--doctest-modules", *[name for name in files if "batch" in name]],
        [
            *("pytest", "-q", "-k", " or ".join(chosen), "tests/test_layout.py"),
            *("tests/test_readme.py", "tests/rules/test_diagnosis.py"),
            "tests/promises/test_invisible.py",
        ],
    ):
        done = run([*python, *command], tmp_path, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    case = ["tests.faults", "copies_for_an_augmentation_that_is_off", "--processes", "1"]
    done = run([*python, *case], tmp_path, tmp_path)

    assert re.search(r"copies_for_an_augmentation_that_is_off +\w+ +right", done.stdout), done
