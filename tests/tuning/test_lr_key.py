"""What shares a key and what does not."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
    default_collate,
    random_split,
)

from lightning_diag.lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning_diag.tuning.lr_key import key_parts

ROOT = Path(__file__).parents[2]
SEARCH = {"min_lr": 1e-8, "max_lr": 1.0, "num_steps": 100}
X = torch.arange(240.0).reshape(60, 4)


class Module(LightningModule):
    def __init__(self, width=8, dropout=0.1, smoothing=0.0, seed=0, lr=1e-3, **optimizer):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, width), nn.Dropout(dropout), nn.Linear(width, 2))
        self.criterion = nn.CrossEntropyLoss(
            weight=torch.tensor([1.0, optimizer.pop("weight", 3.0)]), label_smoothing=smoothing
        )
        self.lr, self.seed, self.options = lr, seed, optimizer

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]), (batch[0].sum(1) > 4).long())

    def configure_optimizers(self):
        options = dict(self.options)
        kind = options.pop("kind", torch.optim.AdamW)
        head = options.pop("head", 1.0)
        groups = [
            {"params": self.net[0].parameters()},
            {"params": self.net[2].parameters(), "lr": head * self.lr},
        ]
        return kind(groups, lr=self.lr, **options)


class OtherLoss(Module):
    def training_step(self, batch, batch_idx):
        return 2 * self.criterion(self.net(batch[0]), (batch[0].sum(1) > 4).long())


OtherLoss.__qualname__ = "Module"


class Noisy(Dataset):
    """Draws from the global generator at every reading."""

    def __len__(self):
        return 60

    def __getitem__(self, place):
        return (X[place] + torch.randn(4),)


class Named(LightningDataModule):
    def __init__(self, fingerprint):
        super().__init__()
        self.fingerprint = fingerprint

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(60, 4)), 8)


def loader(data=None, batch=8, **options):
    return DataLoader(data or TensorDataset(X), batch, **options)


def parts(module=None, data=None, search=SEARCH, values=False, **options):
    """The key's parts, as LRCache would ask for them."""
    found = {}

    class Asks(Callback):
        def on_train_start(self, trainer, pl_module):
            optimizer = trainer.optimizers[0]
            found.update(key_parts(trainer, pl_module, optimizer, search, values=values))
            again = key_parts(trainer, pl_module, optimizer, search, values=values)
            assert again == found

    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 1,
    }
    trainer = Trainer(**{**quiet, **options}, callbacks=[Asks()])
    trainer.fit(module or Module(), loader() if data is None else data)
    return found


SAME = {
    "seed": lambda: parts(Module(seed=5)),
    "learning rate": lambda: parts(Module(lr=0.02)),
    "shuffled": lambda: None,
    "workers": lambda: parts(data=loader(num_workers=1)),
    "epochs": lambda: parts(max_steps=2),
    "accumulated to the same batch": lambda: parts(
        data=loader(batch=4), accumulate_grad_batches=2, max_steps=1
    ),
}


@pytest.mark.parametrize("name", [name for name in SAME if name != "shuffled"])
def test_runs_that_differ_in_this_alone_share_a_key(name):
    assert SAME[name]() == parts()


def test_the_order_of_the_data_does_not_count():
    one = parts(data=loader(shuffle=True, generator=torch.Generator().manual_seed(1)))
    assert one == parts(data=loader(shuffle=True, generator=torch.Generator().manual_seed(2)))


def test_nor_which_part_of_the_data_a_seed_has_drawn():
    split = [
        random_split(TensorDataset(X), [40, 20], torch.Generator().manual_seed(n))[0]
        for n in (1, 2)
    ]
    assert parts(data=loader(split[0])) == parts(data=loader(split[1]))


def test_nor_what_a_data_set_draws():
    torch.manual_seed(1)
    one = parts(data=loader(Noisy()))
    torch.manual_seed(2)
    assert one == parts(data=loader(Noisy()))
    assert one["data.samples"]


DIFFERENT = {
    "width": (lambda: parts(Module(width=9)), {"model.shapes", "model.parameters"}),
    "dropout": (lambda: parts(Module(dropout=0.2)), {"model.settings"}),
    "label smoothing": (lambda: parts(Module(smoothing=0.1)), {"model.settings"}),
    "class weights": (lambda: parts(Module(weight=5.0)), {"model.settings"}),
    "loss": (lambda: parts(OtherLoss()), {"model.code"}),
    "weight decay": (lambda: parts(Module(weight_decay=0.3)), {"optimizer.weight_decay"}),
    "betas": (lambda: parts(Module(betas=(0.8, 0.9))), {"optimizer.betas"}),
    "ratio of groups": (lambda: parts(Module(head=0.1)), {"optimizer.group_ratios"}),
    "optimizer": (lambda: parts(Module(kind=torch.optim.Adam)), {"optimizer"}),
    "batch": (lambda: parts(data=loader(batch=16)), {"batch"}),
    "accumulation": (lambda: parts(accumulate_grad_batches=2), {"batch"}),
    "precision": (lambda: parts(precision="bf16-mixed"), {"precision"}),
    "clip": (lambda: parts(gradient_clip_val=1.0), {"clip.value"}),
    "clip by value": (lambda: parts(gradient_clip_algorithm="value"), {"clip.algorithm"}),
    "search": (lambda: parts(search={**SEARCH, "num_steps": 50}), {"search.num_steps"}),
    "data": (lambda: parts(data=loader(TensorDataset(X + 1))), {"data.samples"}),
    "length": (
        lambda: parts(data=loader(TensorDataset(X[:59]))),
        {"data.length", "data.samples"},
    ),
    "sampler": (lambda: parts(data=loader(shuffle=True)), {"data.sampler"}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_matters_is_part_of_the_key(name):
    make, expected = DIFFERENT[name]
    plain, other = parts(), make()
    changed = {key for key in plain | other if plain.get(key) != other.get(key)}
    assert expected <= changed
    if name not in ("optimizer", "width"):  # these have more than one effect
        # the module keeps the options of its optimizer
        assert changed <= expected | {"model.settings"}


def _steep(x, y):
    return 2 * nn.functional.cross_entropy(x, y)


def _collated(rows):
    return default_collate(rows)


class Holds(Module):
    """Its loss depends on things that are kept in many ways."""

    scale = 1.0

    def __init__(self, **held):
        super().__init__()
        self.held = {"weights": [1.0, 2.0], "loss": nn.functional.cross_entropy, **held}
        self._private = held.get("private", 0.5)
        self.register_buffer("prior", torch.tensor(held.get("prior", [0.5, 0.5])))
        self.save_hyperparameters()


class Scaled(Holds):
    scale = 2.0


Scaled.__qualname__ = "Holds"
HELD = {
    "class weights in a list": lambda: parts(Holds(weights=[1.0, 5.0])),
    "a loss as an attribute": lambda: parts(Holds(loss=nn.functional.mse_loss)),
    "a lambda": lambda: parts(Holds(loss=lambda x, y: (x - y).abs().mean())),
    "another lambda": lambda: parts(Holds(loss=lambda x, y: 2 * (x - y).abs().mean())),
    "a function of a module": lambda: parts(Holds(loss=_steep)),
    "a partial": lambda: parts(Holds(loss=partial(_steep, y=1))),
    "a private number": lambda: parts(Holds(private=0.9)),
    "a buffer": lambda: parts(Holds(prior=[0.1, 0.9])),
    "a word with a hyphen": lambda: parts(Holds(kind="smooth-l1")),
    "a class attribute": lambda: parts(Scaled()),
    "how samples are put together": lambda: parts(Holds(), loader(collate_fn=_collated)),
    "fewer batches": lambda: parts(Holds(), limit_train_batches=2),
}


def test_whatever_a_loss_may_be_made_of_is_part_of_the_key():
    found = {"plain": parts(Holds()), **{name: make() for name, make in HELD.items()}}
    keys = {name: str(sorted(value.items(), key=str)) for name, value in found.items()}
    assert len(set(keys.values())) == len(keys)
    assert found["plain"] == parts(Holds())


def test_values_on_demand():
    one, other = (parts(Module(seed=n), values=True) for n in (1, 2))
    assert {key for key in one if one[key] != other[key]} == {"model.values"}


@pytest.mark.parametrize("own", ["sha256:1", {"rows": 3, "made": [1, 2]}])
def test_data_that_name_themselves_are_believed(own):
    one = parts(data=Named(own))
    assert {key for key in one if key.startswith("data.")} == {"data.fingerprint", "data.code"}
    assert one == parts(data=Named(copy.deepcopy(own)))
    assert one != parts(data=Named("sha256:2"))


def test_reading_the_samples_leaves_no_trace():
    class Counts(Noisy):
        readings = 0

        def __getitem__(self, place):
            self.readings += 1
            return super().__getitem__(place)

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    data, seen = Counts(), []

    class Asks(Callback):
        def on_train_start(self, trainer, pl_module):
            state = torch.get_rng_state()
            key_parts(trainer, pl_module, trainer.optimizers[0], SEARCH)
            seen.append((data.readings, bool((state == torch.get_rng_state()).all())))

    Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Asks()],
    ).fit(Module(), loader(data))
    assert seen == [(0, True)]
    torch.manual_seed(3)
    assert torch.rand(3).tolist() == expected.tolist()


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.tuning.test_lr_key import Module, parts
def shared(x): return 1 * x
def one(x): return shared(x) + 1
def two(x): return shared(x) + 2
def three(x): return one(x) + two(x) + shared(x)
class Sets(Module):
    def training_step(self, batch, batch_idx):
        assert batch_idx not in {"a", "b", "c", "d"}
        assert three(1) + two(1) + one(1) + shared(1)
        return super().training_step(batch, batch_idx)
print("KEY", json.dumps(parts(Sets())))
"""


@pytest.mark.slow
def test_another_process_has_the_same_key():
    """Sets of strings have another order in each process."""
    found = set()
    for number in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": number}
        command = [sys.executable, "-c", SCRIPT, str(ROOT)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(next(line for line in done.stdout.splitlines() if line.startswith("KEY")))
    assert len(found) == 1
