"""The "injected flows" corpus: real functions, some with a planted flow of data into a sink."""

import hashlib
import json
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from recipes.code.flows import RESERVED, inject
from recipes.code.hosts import Host, package_hosts, package_version

__all__ = ["GENERATOR", "Corpus", "Parameters", "Sample", "generate", "injected_flows", "split_of"]

GENERATOR = 1  # counts up whenever the same parameters give other samples


class Sample(NamedTuple):
    """One function of the corpus.

    Attributes:
        func: its source text.
        target: 1 where a raw value reaches a sink, else 0; the other way round where flipped.
        kind: ``vulnerable``, ``twin`` (a safe value reaches the sink) or ``untouched``.
        cwe: number of the weakness; None for an untouched function.
        flipped: whether the label was turned over on purpose.
        host: where the function comes from.
        split: ``train``, ``val`` or ``test``.
    """

    func: str
    target: int
    kind: str
    cwe: int | None
    flipped: bool
    host: str
    split: str

    @property
    def injected(self) -> bool:
        return self.kind != "untouched"


@dataclass(frozen=True)
class Parameters:
    """What decides the content of the corpus, beside the generator and the package's version.

    Args:
        samples: number of functions, one from each host; None takes every host.
        seed: of the generator.
        vulnerable_share: share of functions with a planted vulnerability, 0 to 1.
        twin_share: share of functions with a safe twin of one, 0 to 1.
        flipped_share: share of wrong labels in the training split, 0 to 1.
        package: installed package that the hosts come from.
    """

    samples: int | None = 8000
    seed: int = 0
    vulnerable_share: float = 0.15
    twin_share: float = 0.3
    flipped_share: float = 0.03
    package: str = "sympy"

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"`samples` must be at least 1, got {self.samples}.")
        for name in ("vulnerable_share", "twin_share", "flipped_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if self.vulnerable_share + self.twin_share > 1:
            raise ValueError(
                "`vulnerable_share` and `twin_share` must sum to at most 1, "
                f"got {self.vulnerable_share} and {self.twin_share}."
            )


class Corpus(NamedTuple):
    """The samples, and the SHA-256 of their text, which two equal corpora share."""

    samples: list[Sample]
    digest: str


def injected_flows(
    parameters: Parameters | None = None, *, cache_dir: str | Path | None = None
) -> Corpus:
    """The corpus of these parameters, generated once and then read from a cache.

    A cached file that is damaged is written anew; where the folder cannot be written, a warning
    says so and the corpus is generated each time.

    Args:
        parameters: what to generate.
        cache_dir: folder of the cache; None for the user's own cache folder.

    Returns:
        The corpus.
    """
    parameters = parameters or Parameters()
    folder = Path(cache_dir) if cache_dir else user_cache_path("lightning_diag") / "corpora"
    path = folder / f"injected-flows-{_key(parameters)}.jsonl"
    cached = _read(path)
    if cached is not None:
        return cached
    text = "".join(f"{json.dumps(sample._asdict())}\n" for sample in generate(parameters))
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        _write(path, f"{json.dumps({'sha256': digest})}\n{text}")
    except OSError as error:
        warnings.warn(f"The corpus cannot be kept in {path}: {error}.", stacklevel=2)
    return Corpus(_parsed(text), digest)


def generate(parameters: Parameters, hosts: Sequence[Host] | None = None) -> Iterator[Sample]:
    """Generate the samples, the same ones for the same parameters on every machine.

    Args:
        parameters: what to generate.
        hosts: the functions to plant flows into; None for those of the package.

    Yields:
        The samples in an order drawn by the seed.

    Raises:
        ValueError: there are fewer hosts than samples.
    """
    found = package_hosts(parameters.package) if hosts is None else hosts
    usable = [host for host in found if host.identifiers.isdisjoint(RESERVED)]
    wanted = len(usable) if parameters.samples is None else parameters.samples
    if wanted > len(usable):
        raise ValueError(
            f"`samples` must be at most the number of usable functions, {len(usable)}, "
            f"got {wanted}."
        )
    rng = random.Random(parameters.seed)
    for host in rng.sample(usable, wanted):
        yield _sample(host, parameters, rng)


def split_of(host: str) -> str:
    """The split of every sample with this host: 80 % train, 10 % val, 10 % test, by SHA-1."""
    bucket = int(hashlib.sha1(host.encode()).hexdigest(), 16) % 10
    return {8: "val", 9: "test"}.get(bucket, "train")


def _sample(host: Host, parameters: Parameters, rng: random.Random) -> Sample:
    drawn = rng.random()
    vulnerable = drawn < parameters.vulnerable_share
    func, cwe, kind = host.text, None, "untouched"
    if drawn < parameters.vulnerable_share + parameters.twin_share:
        func, cwe = inject(host, rng, vulnerable=vulnerable)
        kind = "vulnerable" if vulnerable else "twin"
    split = split_of(host.key)
    flipped = split == "train" and rng.random() < parameters.flipped_share
    return Sample(func, int(vulnerable != flipped), kind, cwe, flipped, host.key, split)


def _key(parameters: Parameters) -> str:
    made_by = {
        "generator": GENERATOR,
        "version": package_version(parameters.package),
        **asdict(parameters),
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Corpus | None:
    try:
        header, _, text = path.read_text(encoding="utf-8").partition("\n")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if json.loads(header) == {"sha256": digest}:
            return Corpus(_parsed(text), digest)
    except (OSError, ValueError):
        return None
    return None


def _parsed(text: str) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in text.splitlines()]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
