"""What a planted fault or a healthy run is: how it is built, what it claims, how that is shown."""

import copy
import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_diag.lightning import LightningModule
from tests.faults.witness import Witness

Config = dict[str, Any]

DEFAULTS: Config = {
    "seed": 0,
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 3e-3},
    "component_lrs": None,
    "model": {"warmup_share": 0.0},
    "data": {},
    "hardware": {"precision": "32-true", "accumulate": 1, "batch_size": 32, "num_workers": 0},
    "trainer": {"max_steps": 200, "gradient_clip_val": None, "val_check_interval": 50},
}
"""Settings of a run, by the keys that the project's own experiments have."""


# how the names of cases begin that no rule has been changed for
_UNSEEN = "unseen_"


@dataclass(frozen=True)
class Job:
    """What is trained.

    Args:
        model: The module.
        train: Batches to train on; may be gone through several times.
        val: Batches to validate on.
        components: Patterns for the diagnostics, None for the top-level children.
    """

    model: LightningModule
    train: DataLoader
    val: DataLoader | None = None
    components: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Case:
    """A run with a known truth.

    Args:
        name: Unique, in snake_case.
        network: mlp, cnn, gru, transformer, gnn, autoencoder, contrastive, gan, ...
        build: Makes the job out of a configuration; every random number comes from the global
            generators, which are seeded before.
        config: `DEFAULTS`, with the case's own settings over them.
        verify: Asserts, from what `Witness` saw and never from a rule, that the run is what it
            claims to be.
        found: Rules of which one must be found above ``info``; none for a healthy run.
        cause: Rules of which one must be the first finding.
        onset: The step at which it goes wrong.
        repairable: Whether a key of the configuration is the cause, so that it can be mended there.
        cured: Asserts that the mended run is well, beyond the silence of the rules.
        healthy: Whether nothing above ``info`` may be found.
        tricky: Why a healthy run looks sick, in a few words.
    """

    name: str
    network: str
    build: Callable[[Config], Job]
    config: Config
    verify: Callable[[Witness], None]
    found: tuple[str, ...] = ()
    cause: tuple[str, ...] = ()
    onset: int = 0
    repairable: bool = False
    cured: Callable[[Witness], None] | None = None
    healthy: bool = False
    tricky: str = ""

    @property
    def held_out(self) -> bool:
        """Whether no threshold was chosen by it at first: every second one, by its hash."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 1

    @property
    def unseen(self) -> bool:
        """Whether it was written when the rules were done, and no threshold was chosen by it."""
        return self.name.startswith(_UNSEEN)

    @property
    def group(self) -> str:
        """The group of cases that it is counted with."""
        if self.unseen:
            return "written last"
        if self.name.startswith(("later_", "fresh_", "last_")):
            return "second to fourth exam"
        return "second half" if self.held_out else "first half"

    def __reduce__(self) -> tuple[Any, ...]:
        # functions without a name do not travel between processes; names do
        return _named, (self.name,)

    def seed(self, number: int = 0) -> int:
        """A seed of its own."""
        return int.from_bytes(hashlib.sha256(f"{self.name} {number}".encode()).digest()[:4])


CASES: dict[str, Case] = {}


def _named(name: str) -> Case:
    return all_cases()[name]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """Settings put over others, key by key."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = merged(inner, value) if both else copy.deepcopy(value)
    return result


def fault(
    name: str,
    network: str,
    *,
    cause: str | tuple[str, ...],
    found: tuple[str, ...] = (),
    onset: int = 0,
    config: Mapping[str, Any] | None = None,
    verify: Callable[[Witness], None],
    repairable: bool = False,
    cured: Callable[[Witness], None] | None = None,
) -> Callable[[Callable[[Config], Job]], Callable[[Config], Job]]:
    """Enter a planted fault; `found` is what may be found besides `cause`."""
    causes = (cause,) if isinstance(cause, str) else cause
    return _enter(
        name=name,
        network=network,
        config=merged(DEFAULTS, config or {}),
        verify=verify,
        found=(*causes, *found),
        cause=causes,
        onset=onset,
        repairable=repairable,
        cured=cured,
    )


def healthy(
    name: str,
    network: str,
    *,
    tricky: str = "",
    config: Mapping[str, Any] | None = None,
    verify: Callable[[Witness], None],
) -> Callable[[Callable[[Config], Job]], Callable[[Config], Job]]:
    """Enter a healthy run."""
    settings = merged(DEFAULTS, config or {})
    return _enter(
        name=name, network=network, config=settings, verify=verify, healthy=True, tricky=tricky
    )


def _enter(
    name: str, **fields: Any
) -> Callable[[Callable[[Config], Job]], Callable[[Config], Job]]:
    def enter(build: Callable[[Config], Job]) -> Callable[[Config], Job]:
        if name in CASES:
            raise ValueError(f"A case must have a name of its own, got {name!r} twice.")
        CASES[name] = Case(name=name, build=build, **fields)
        return build

    return enter


def all_cases() -> dict[str, Case]:
    """Every case of the folders ``faulty`` and ``healthy``, by name."""
    here = Path(__file__).parent
    for folder in ("faulty", "healthy"):
        for file in sorted((here / folder).glob("[!_]*.py")):
            importlib.import_module(f"tests.faults.{folder}.{file.stem}")
    return CASES
