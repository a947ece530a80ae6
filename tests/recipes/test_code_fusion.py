import inspect
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.metrics import accuracy_score, f1_score

from lightning_diag import GradientHealth, RunLogger, read_run
from lightning_diag.lightning import Callback, Trainer, callbacks
from recipes.code.data import CodeData
from recipes.code.fusion import FACTORS, CodeFusion, LogitFusion
from recipes.code.gnn import CodeGNN
from recipes.code.model import CodeClassifier
from tests.recipes.test_code_gnn import tiny_gnn
from tests.recipes.test_model import tiny_model

SEED = 42


@pytest.fixture(scope="module")
def own_files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    paths = {}
    for split, count in (("train", 48), ("val", 16)):
        rows = [
            {
                "func": f"a = {i}\nb = {'input()' if i % 3 else 'a'}\nrun(b)",
                "target": int(i % 3 > 0),
            }
            for i in range(count)
        ]
        paths[f"{split}_path"] = str(folder / f"{split}.jsonl")
        Path(paths[f"{split}_path"]).write_text("\n".join(map(json.dumps, rows)))
    return paths


def data_of(own_files, **arguments) -> CodeData:
    return CodeData(**own_files, vocabulary_size=512, **{"batch_size": 16, **arguments})


def train_run(folder: Path, model: CodeClassifier, data: CodeData, seed: int = SEED) -> None:
    """A run as the command writes it: run.json with seed and data, checkpoints/best.ckpt."""
    logger = RunLogger(folder)
    best = callbacks.ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val_auc", mode="max", enable_version_counter=False
    )

    class Info(Callback):
        def on_fit_start(self, trainer, pl_module):
            logger.update_info(seed=seed, data=data.fingerprint)

    Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=[best, Info()],
    ).fit(model, datamodule=data)


@pytest.fixture(scope="module")
def runs(own_files, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    train_run(folder / "transformer", tiny_model(dropout=0.1), data_of(own_files))
    train_run(folder / "gnn", tiny_gnn(dropout=0.1), data_of(own_files))
    return {f"{name}_run": str(folder / name) for name in ("transformer", "gnn")}


def fusion_of(runs, **arguments) -> CodeFusion:
    return CodeFusion(**runs, **{"vocabulary_size": 512, "seed": SEED, **arguments})


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Seen(Callback):
    """What holds at each step."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.modes: set[tuple[bool, bool, bool]] = set()
        self.without_gradient: set[str] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        parts = pl_module.transformer, pl_module.gnn, pl_module.fusion
        self.modes.add(tuple(part.training for part in parts))
        self.without_gradient |= {
            name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None
        }


def test_the_branches_are_those_of_the_best_checkpoints(runs):
    model = fusion_of(runs)
    for name in ("transformer", "gnn"):
        path = Path(runs[f"{name}_run"]) / "checkpoints" / "best.ckpt"
        saved = torch.load(path, weights_only=True)["state_dict"]
        branch = getattr(model, name).state_dict()
        assert set(saved) == set(branch)
        assert all(torch.equal(saved[key], branch[key]) for key in saved)


def test_frozen_branches_are_the_same_to_the_last_bit(runs, own_files, quiet, capsys):
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    model = fusion_of(runs, branches="frozen", optimizer=optimizer)
    before = {name: state_of(getattr(model, name)) for name in ("transformer", "gnn", "fusion")}
    seen = Modes()
    trainer = Trainer(**{**quiet, "max_epochs": 3}, logger=False, callbacks=[seen])
    trainer.fit(model, datamodule=data_of(own_files))
    for name in ("transformer", "gnn"):
        after = getattr(model, name).state_dict()
        assert all(torch.equal(after[key], before[name][key]) for key in after)
        assert all(p.grad is None for p in getattr(model, name).parameters())
    changed = model.fusion.state_dict()
    assert not any(torch.equal(changed[key], before["fusion"][key]) for key in changed)
    assert seen.modes == {(False, False, True)}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.fusion.parameters()}
    assert "frozen" in capsys.readouterr().out


class Modes(Callback):
    def __init__(self) -> None:
        self.modes: set[tuple[bool, bool, bool]] = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = pl_module.transformer, pl_module.gnn, pl_module.fusion
        self.modes.add(tuple(part.training for part in parts))


def test_branches_that_train_have_a_tenth_half_and_all_of_the_rate(runs, own_files, quiet, capsys):
    model = fusion_of(runs, optimizer=partial(torch.optim.SGD, lr=0.2))
    before = {name: state_of(getattr(model, name)) for name in FACTORS}
    seen = Seen()
    trainer = Trainer(
        **{**quiet, "max_epochs": 3}, logger=False, callbacks=[seen], accumulate_grad_batches=2
    )
    trainer.fit(model, datamodule=data_of(own_files))
    assert len(seen.rates) == 6  # three batches an epoch make two steps
    assert FACTORS == {"transformer": 0.1, "gnn": 0.5, "fusion": 1.0}
    for rates in seen.rates:
        assert set(rates) == set(FACTORS)
        for name, factor in FACTORS.items():
            assert rates[name] == pytest.approx(factor * rates["fusion"])
    assert max(rates["fusion"] for rates in seen.rates) == pytest.approx(0.2)
    assert seen.modes == {(True, True, True)}
    assert seen.without_gradient == set()
    for name in FACTORS:
        after = dict(getattr(model, name).named_parameters())
        assert any(not torch.equal(after[key], before[name][key]) for key in after)
    assert "train on" in capsys.readouterr().out


def test_other_factors_can_be_given(runs, own_files, quiet):
    seen = Seen()
    optimizer = partial(torch.optim.SGD, lr=0.2)
    factors = {"transformer": 0.25, "gnn": 1.0, "fusion": 2.0}
    model = fusion_of(runs, component_lrs=factors, optimizer=optimizer)
    Trainer(**quiet, logger=False, callbacks=[seen]).fit(model, datamodule=data_of(own_files))
    for rates in seen.rates:
        assert rates["transformer"] == pytest.approx(rates["fusion"] / 8)
        assert rates["gnn"] == pytest.approx(rates["fusion"] / 2)


def test_gradients_are_told_apart_by_branch(runs, own_files, quiet, tmp_path):
    found = [GradientHealth(every_n_steps=1, on_error="raise")]
    trainer = Trainer(**quiet, logger=RunLogger(tmp_path / "run"), callbacks=found)
    trainer.fit(fusion_of(runs), datamodule=data_of(own_files))
    rows = read_run(tmp_path / "run").grad
    named = {name for name in rows["component"].to_list() if name}
    assert named == {"transformer", "gnn", "fusion"}
    assert all(value > 0 for value in rows.filter(rows["component"] == "gnn")["l2"])


def test_the_fused_logits_agree_with_their_formula_in_numpy():
    fusion = LogitFusion(5, 0.0).double().eval()
    torch.nn.init.constant_(fusion.mix, 0.7)
    t, g = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    one, two = fusion.net[0], fusion.net[3]
    weights = [x.detach().numpy() for x in (one.weight, one.bias, two.weight, two.bias)]
    share = 1 / (1 + np.exp(-0.7))
    pair = np.concatenate([t.numpy(), g.numpy()], axis=1)
    net = np.maximum(pair @ weights[0].T + weights[1], 0) @ weights[2].T + weights[3]
    expected = ((share * t.numpy() + (1 - share) * g.numpy()) + net) / 2
    np.testing.assert_allclose(fusion(t, g).detach().numpy(), expected, rtol=1e-12)


def test_both_branches_count_the_same_at_first():
    assert LogitFusion(4, 0.0).transformer_share == 0.5


def test_metrics_are_those_of_the_evaluation(runs, own_files, quiet):
    outputs = []

    class Outputs(Callback):
        def on_validation_batch_end(self, trainer, pl_module, out, batch, batch_idx):
            outputs.append((out["logits"].argmax(1), out["target"]))

    trainer = Trainer(**quiet, logger=False, callbacks=[Outputs()])
    model = fusion_of(runs)
    (metrics,) = trainer.validate(model, datamodule=data_of(own_files), verbose=False)
    predicted, target = (torch.cat(part) for part in zip(*outputs, strict=True))
    assert metrics["val_f1"] == pytest.approx(f1_score(target, predicted))
    assert metrics["val_accuracy"] == pytest.approx(accuracy_score(target, predicted))
    assert metrics["transformer_share"] == 0.5


@pytest.mark.parametrize("branches", ["frozen", "discriminative"])
def test_a_checkpoint_of_the_fusion_brings_it_back(branches, runs, own_files, quiet, tmp_path):
    model = fusion_of(runs, branches=branches)
    trainer = Trainer(**quiet, logger=False)
    trainer.fit(model, datamodule=data_of(own_files))
    trainer.save_checkpoint(tmp_path / "fusion.ckpt")
    again = CodeFusion.load_from_checkpoint(tmp_path / "fusion.ckpt", weights_only=False)
    state, expected = again.state_dict(), model.state_dict()
    assert again.branches == branches
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"branches": "both"},
            "`branches` must be one of ('frozen', 'discriminative'), got 'both'",
        ),
        (
            {"branches": "frozen", "component_lrs": {"gnn": 0.5}},
            "`component_lrs` must be null where `branches` is frozen",
        ),
        ({"seed": 7}, "`transformer_run` must be a run with seed 7, got seed 42"),
        ({"vocabulary_size": 600}, "a vocabulary of 600 tokens, as the data have, got 512"),
        ({"warmup_share": -1.0}, "`warmup_share` must be between 0 and 1, got -1.0."),
    ],
)
def test_arguments_are_checked(runs, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fusion_of(runs, **arguments)


def test_a_missing_run_is_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="`gnn_run` must be a run with `checkpoints/best"):
        fusion_of({**runs, "gnn_run": str(tmp_path / "none")})


def test_a_run_of_another_model_is_refused(runs):
    swapped = {"transformer_run": runs["gnn_run"], "gnn_run": runs["transformer_run"]}
    with pytest.raises(ValueError, match="`transformer_run` must be a run of CodeTransformer"):
        fusion_of(swapped)


def altered(runs, tmp_path, change) -> dict[str, str]:
    """The runs with another checkpoint of the graph network."""
    shutil.copytree(runs["gnn_run"], tmp_path / "gnn")
    path = tmp_path / "gnn" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return {**runs, "gnn_run": str(tmp_path / "gnn")}


def test_other_shapes_are_refused(runs, tmp_path):
    def narrow(checkpoint):
        checkpoint["hyper_parameters"]["width"] = 8

    with pytest.raises(ValueError, match="size mismatch for embedding"):
        fusion_of(altered(runs, tmp_path, narrow))


class Payload:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(runs, tmp_path, capsys):
    def poison(checkpoint):
        checkpoint["extra"] = Payload()

    with pytest.raises(ValueError, match="a whole checkpoint of plain values"):
        fusion_of(altered(runs, tmp_path, poison))
    assert "unpickled" not in capsys.readouterr().out


def test_a_torn_checkpoint_is_refused(runs, tmp_path):
    other = altered(runs, tmp_path, lambda checkpoint: None)
    path = Path(other["gnn_run"]) / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="a whole checkpoint of plain values"):
        fusion_of(other)


def test_runs_on_other_data_are_refused(runs, own_files, quiet, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"code": "a = 1", "label": 0}\n{"code": "b = a", "label": 1}\n')
    data = CodeData(train_path=str(other), val_path=str(other), vocabulary_size=512)
    with pytest.raises(ValueError, match="`transformer_run` must be a run on the same data"):
        Trainer(**quiet, logger=False).fit(fusion_of(runs), datamodule=data)


CONF = Path(__file__).parents[2] / "conf"


def composed(experiment: str, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *overrides])
    config.run_dir = "unused"
    for key, value in (("batch_size", 32), ("num_workers", 0), ("pin_memory", False)):
        if config.hardware[key] is None:
            config.hardware[key] = value
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", ["code_gnn", "code_gnn_full"])
def test_the_experiments_of_the_graph_network(experiment):
    config = composed(experiment, "seed=7", "model.width=8")
    model = instantiate(config["model"], _convert_="all")
    data = instantiate(config["data"], _convert_="all")
    assert data.class_weights is None
    assert model.gamma == 1.5
    assert model.embedding.token.num_embeddings == data.vocabulary_size
    optimizer = model.optimizer(model.parameters())
    assert optimizer.defaults["weight_decay"] == 1e-4
    assert (config["monitor"], config["monitor_mode"]) == ("val_auc", "max")
    statistics = instantiate(config["callbacks"]["graph_statistics"])
    assert statistics.path == Path("unused/graph_statistics.json")


@pytest.mark.parametrize("experiment", ["code_fusion", "code_fusion_full"])
def test_the_experiments_of_the_fusion(experiment, runs):
    given = [f"model.{key}='{value}'" for key, value in runs.items()]
    config = composed(experiment, *given, "data.vocabulary_size=512")
    model = instantiate(config["model"], _convert_="all")
    assert model.component_lrs == FACTORS
    assert config["data"]["batch_size"] == 32
    assert config["trainer"]["accumulate_grad_batches"] == 2
    assert config["components"] is None
    defaults = composed(experiment, "seed=9")["model"]
    assert defaults["gnn_run"] == "runs/reproduce/gnn/seed_9"


@pytest.mark.parametrize(
    ("file", "made", "wired"),
    [
        ("code_gnn", CodeGNN, set()),
        ("code_fusion", CodeFusion, {"transformer_run", "gnn_run", "seed"}),
    ],
)
def test_the_yaml_repeats_the_arguments_and_their_defaults(file, made, wired):
    path = CONF / "model" / f"{file}.yaml"
    written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert written.pop("_target_") == f"{made.__module__}.{made.__name__}"
    taken = inspect.signature(made).parameters
    assert set(written) == set(taken)
    wired = wired | {"optimizer", "component_lrs", "components", "vocabulary_size"}
    for name in set(written) - wired:
        assert written[name] == taken[name].default, name
