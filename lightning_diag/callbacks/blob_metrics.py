"""Do weight pairs form blobs?"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_diag.callbacks.base import Diagnostic, Interval, OnError, Row
from lightning_diag.callbacks.blob_pairs import WeightPair, checked_pairs, find_pair, named_pairs
from lightning_diag.callbacks.blob_results import EpochResults, split_metrics
from lightning_diag.callbacks.blob_rows import SEED_KEYS, blob_row, point_row
from lightning_diag.callbacks.run import run_logger
from lightning_diag.functional.blob_metrics import (
    adaptive_sample_size,
    blob_settings,
    blob_summaries,
    sample_pairs,
)
from lightning_diag.lightning import LightningModule, Trainer

__all__ = ["BlobMetrics"]

_SEEDS = 2**63


class BlobMetrics(Diagnostic):
    """Clusters in the plane of weight pairs (encoder[i, j], decoder[j, i]), epoch by epoch.

    Where hidden units specialise, pairs leave the cloud around zero and gather in blobs of about
    one percent each. A sample of pairs is drawn from each named pair of weights and clustered. The
    correlation of the two sides is reported and not judged: outer blobs on a diagonal make it
    strongly positive.

    The preset ``robust`` measures each axis in widths of its own blobs (`spread`: shorth) and asks
    for neighbourhoods of 0.45 % of the sample: with 5000 pairs it finds blobs of 1 % each, and
    most of 0.7 %, and sees one cluster in a single cloud, heavy tails and all. Blobs of equal size
    must be some ten deviations apart. The preset ``seed`` (unscaled, radius 0.1, 50 points) is
    that of the guide this diagnostic comes from; it needs weights between -1 and 1 and blobs of
    1.75 %.

    Measures at the end of an epoch, before its checkpoint, with one copy of the sample to the host
    and about 20 ms of clustering for 5000 pairs (HDBSCAN: about 100 ms); results.json costs
    another copy, of the epoch's metrics. Replicas are equal, so that rank 0 alone measures them.
    Weights sharded by ModelParallelStrategy are put together on every rank for a moment; those of
    FSDPStrategy cannot be seen, which is said. The weights are those of the optimizer, whatever
    precision the forward pass has; random numbers come from generators of its own.

    Args:
        pairs: Name to the two parameters, ``{"net": ["fc1.weight", "fc2.weight"]}``, of shapes
            ``(h, d)`` and ``(d, h)``; None for the first two linear layers that fit one another.
        every_n_epochs: Epochs between two measurements; None for none at the end of epochs.
        every_n_steps: Also measure after each n-th optimizer step; None for epochs alone.
        preset: ``"robust"`` or ``"seed"``: what is not given among the next three.
        eps: Radius of a neighbourhood.
        min_samples: Points in it, or their share of the sample (then at least 12).
        scale: Unit of each axis: ``"none"``, ``"zscore"``, ``"mad"`` or ``"shorth"``.
        method: ``"dbscan"``, or ``"hdbscan"``, which needs no `eps`.
        sample_size: Pairs to draw; all of them where there are no more.
        adaptive: Half of it (2000 at least) in the first 30 % of training, double after 80 %.
        seed: Of the samples, together with the step.
        keep_points: Pairs to record for a picture, of rare blobs first; 0 for none.
        results: Also write ``results.json`` into the run's folder after every epoch.
        on_error: ``"warn"`` ends the diagnostic with a warning, ``"raise"`` lets the exception out.
        overhead_budget: Share of training time that ``every_n_steps="auto"`` may spend.

    Raises:
        TypeError: If `pairs` is no mapping.
        ValueError: If another argument is out of range.

    Rows:
        ``blob.jsonl``, for each pair of weights, which is the row's component: ``encoder`` and
        ``decoder`` (parameter names); ``weight_correlation`` (Pearson, null without spread);
        ``encoder_mean``, ``encoder_std``, ``decoder_mean``, ``decoder_std`` (of the whole sample);
        ``n_clusters_dbscan`` (whatever the method); ``silhouette_score`` (-1 to 1 in scaled units,
        null below two clusters); ``cluster_centers`` and ``cluster_stds`` (encoder and decoder
        weight, for the three largest; where there is none, the mean of all as a centre);
        ``cluster_shares`` (of the sample, for the ten largest); ``largest_share``;
        ``n_noise_points`` and ``noise_share``; ``n_pairs_analyzed``; ``n_pairs`` (in the weights);
        ``nonfinite`` (pairs left out); ``computation_time_ms`` (of all pairs of weights, on the
        host); ``method``, ``scale``, ``eps``, ``min_samples`` (points).

        ``blob_sample.jsonl``, at the 1st, 2nd, 4th, 8th, ... and the last measurement: ``encoder``,
        ``decoder`` and ``cluster`` (-1 for noise), lists of equal length.

        ``results.json``: ``experiment_name``, ``output_dir``, ``training_duration_seconds``,
        ``training_history`` (``epoch`` from 1 on, ``train``, ``test``, ``diagnostics``),
        ``final_metrics``. ``train`` and ``test`` are what was logged, without ``train_`` and
        ``val_``; ``diagnostics`` are those of the first pair, and all by name under ``pairs`` if
        there are several. An epoch's ``train`` is filled in when the next one starts.

    Logs:
        For each pair of weights under ``blob/<pair>/``: ``weight_correlation``, ``encoder_mean``,
        ``encoder_std``, ``decoder_mean``, ``decoder_std``, ``n_clusters_dbscan``,
        ``silhouette_score``, ``largest_share``, ``noise_share``, ``nonfinite``.

    Example:
        >>> BlobMetrics({"net": ["fc1.weight", "fc2.weight"]}, eps=1.5).settings
        BlobSettings(scale='shorth', eps=1.5, min_samples=0.0045, method='dbscan')
    """

    prefix = "blob"
    paced_by_steps = False
    collective_hooks = frozenset(
        {"on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end"}
    )
    logged = frozenset(SEED_KEYS[:7]) | {"largest_share", "noise_share", "nonfinite"}

    def __init__(
        self,
        pairs: Mapping[str, Sequence[str]] | None = None,
        every_n_epochs: int | None = 1,
        every_n_steps: Interval | None = None,
        preset: str = "robust",
        eps: float | None = None,
        min_samples: int | float | None = None,
        scale: str | None = None,
        method: str = "dbscan",
        sample_size: int = 5000,
        adaptive: bool = False,
        seed: int = 0,
        keep_points: int = 300,
        results: bool = True,
        on_error: OnError = "warn",
        overhead_budget: float = 0.01,
    ) -> None:
        self.pairs = checked_pairs(pairs)
        self.settings = blob_settings(
            preset, scale=scale, eps=eps, min_samples=min_samples, method=method
        )
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"`every_n_epochs` must be at least 1 or None, got {every_n_epochs}.")
        if every_n_epochs is None and every_n_steps is None:
            raise ValueError("`every_n_steps` must be given where `every_n_epochs` is None.")
        if sample_size < 2:
            raise ValueError(f"`sample_size` must be at least 2, got {sample_size}.")
        if keep_points < 0:
            raise ValueError(f"`keep_points` must be at least 0, got {keep_points}.")
        self.every_n_epochs = every_n_epochs
        self.preset, self.eps, self.min_samples = preset, eps, min_samples
        self.scale, self.method = scale, method
        self.sample_size, self.adaptive, self.seed = sample_size, adaptive, seed
        self.keep_points, self.results = keep_points, results
        self._found: dict[str, WeightPair] = {}
        self._history: EpochResults | None = None
        self._open_epoch: int | None = None
        self._unwritable = False
        super().__init__(
            None,
            every_n_steps=every_n_steps,
            on_error=on_error,
            overhead_budget=overhead_budget,
        )

    # ---- hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.monotonic()
        self._unwritable = False
        # first of all, since every rank must have them where there are collectives
        self._found = self._weights(trainer)
        run = run_logger(trainer)
        if self.results and run is not None and trainer.is_global_zero:
            self._history = EpochResults(run.path, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._complete_epoch(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._step = self.step_of(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.is_due(trainer, optimizer):
            self._due = True
            self._step = self.step_of(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due:
            self._due = False
            self._measure(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self.every_n_epochs
        due = every is not None and (trainer.current_epoch + 1) % every == 0
        if due and self._last_measured != trainer.global_step:
            self._measure(trainer)
            # it was in no batch, whose cost the interval follows
            self._clock.measuring = False
        super().on_train_epoch_end(trainer, pl_module)
        if self._history is not None:
            entry = self._history.epoch(trainer.current_epoch + 1)
            if due and self._diagnostics:
                entry["diagnostics"] = self._diagnostics
            self._open_epoch = trainer.current_epoch + 1
            self._write_results(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._complete_epoch(trainer)
        self._write_points(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            self.collect(wait=True)
            self._complete_epoch(trainer)
            self._write_points(trainer)
        finally:
            super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._found = {}

    def release(self) -> None:
        super().release()
        self._history = None

    def forget(self) -> None:
        super().forget()
        self._step = 0
        self._due = False
        self._last_measured = -1
        self._validated = False
        self._open_epoch = None
        self._diagnostics: dict[str, Any] = {}
        self._points: list[Row] = []
        self._points_place = (0, 0)
        self._began = time.monotonic()
        self._before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "train_seconds": self._train_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before = state_dict["train_seconds"]

    # ---- measuring ----

    def _weights(self, trainer: Trainer) -> dict[str, WeightPair]:
        model = trainer.lightning_module
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if self._sharded and "FSDPStrategy" in kinds:
            self.note(
                trainer, "FSDPStrategy's shards are not seen; nothing is measured.", "warning"
            )
            return {}
        if self.pairs is None:
            found = find_pair(model)
            for pair in found.values():
                self.note(trainer, f"pairs `{pair.encoder_name}` with `{pair.decoder_name}`.")
            if not found:
                self.note(
                    trainer,
                    "no two linear layers fit one another; `pairs` can name the weights.",
                    "warning",
                )
            return found
        found, problems = named_pairs(model, self.pairs)
        for problem in problems:
            self.note(trainer, problem, "warning")
        if problems and self.on_error == "raise":
            raise ValueError(problems[0])
        return found

    def _measure(self, trainer: Trainer) -> None:
        self._last_measured = trainer.global_step
        if not self._found or not (self._sharded or trainer.is_global_zero):
            return
        start = time.perf_counter()
        size, step = self.sample_size, self._step
        if self.adaptive:
            size = adaptive_sample_size(size, _progress(trainer))
        # collectives come first, on a rank that has failed too; what may fail comes later
        weights = [(_whole(pair.encoder), _whole(pair.decoder)) for pair in self._found.values()]
        device = weights[0][0].device
        began = self.device_began(device)
        samples: list[Tensor] = []

        def compute() -> Tensor:
            for place, (encoder, decoder) in enumerate(weights):
                generator = self._generator(encoder.device, place, step)
                samples.append(sample_pairs(encoder, decoder, size, generator))
            return torch.zeros(0, dtype=torch.float64)

        marks = self.gather(compute, 0, device) if self._sharded else compute()
        if not trainer.is_global_zero:
            samples.clear()
        # rows wait for the copy, while the weights may go
        sides = {
            name: (pair.encoder_name, pair.decoder_name, pair.encoder.numel())
            for name, pair in self._found.items()
        }
        count, counts = marks.numel(), [len(sample) for sample in samples]
        spent = time.perf_counter() - start

        def finish(values: Tensor) -> None:
            if count:
                self.all_well(values[:count].tolist())
            if counts:
                pairs = values[count:].view(-1, 2)
                self._write(trainer, pairs, counts, sides, step, spent)

        parts = [one.reshape(-1) for one in [*([marks] if count else []), *samples]]
        # pairs on another device join those of the first
        near = [one if one.device == device else one.to(device) for one in parts]
        self.read(torch.cat(near), finish, began)

    def _generator(self, device: torch.device, place: int, step: int) -> torch.Generator:
        seed = ((self.seed * 1_000_003 + step) * 1009 + place) % _SEEDS
        return torch.Generator(device).manual_seed(seed)

    def _write(
        self,
        trainer: Trainer,
        values: Tensor,
        counts: Sequence[int],
        sides: Mapping[str, tuple[str, str, int]],
        step: int,
        spent: float,
    ) -> None:
        start = time.perf_counter()
        summaries = blob_summaries(values, counts, self.settings, show=self.keep_points)
        milliseconds = 1000 * (spent + time.perf_counter() - start)
        rows = [
            blob_row(name, side, summary, self.settings, milliseconds)
            for (name, side), summary in zip(sides.items(), summaries, strict=True)
        ]
        self.report(trainer, rows, step=step)
        by_name = {str(row["component"]): {key: row[key] for key in SEED_KEYS} for row in rows}
        self._diagnostics = dict(next(iter(by_name.values())))
        if len(by_name) > 1:
            self._diagnostics["pairs"] = by_name
        self._points_place = (step, trainer.current_epoch)
        self._points = [
            point_row(name, summary)
            for name, summary in zip(sides, summaries, strict=True)
            if summary.shown
        ]
        if self._measured.bit_count() == 1:
            self._write_points(trainer)

    # ---- writing ----

    def _write_points(self, trainer: Trainer) -> None:
        rows, self._points = self._points, []
        run = run_logger(trainer)
        if rows and run is not None:
            # the epoch of the measurement, which may be over
            step, epoch = self._points_place
            run.log_rows("blob_sample", rows, step=step, epoch=epoch)

    def _complete_epoch(self, trainer: Trainer) -> None:
        """Add the metrics of the epoch that has ended: Lightning has them once its hooks are over.

        They are read from its memory, since asking the trainer could begin a collective.
        """
        epoch, self._open_epoch = self._open_epoch, None
        if self._history is None or epoch is None:
            return
        diagnostics = {
            callback.prefix
            for callback in getattr(trainer, "callbacks", ())
            if isinstance(callback, Diagnostic)
        }
        train, test = split_metrics(self._callback_metrics, diagnostics, validated=self._validated)
        self._validated = False
        self._history.epoch(epoch).update(train=train, test=test)
        self._write_results(trainer)

    def _write_results(self, trainer: Trainer) -> None:
        if self._history is None:
            return
        try:
            self._history.write(self._train_seconds())
        except OSError as error:
            # it is written whole, so that the next epoch makes up for it
            if not self._unwritable:
                self._unwritable = True
                self.note(trainer, f"results.json cannot be written: {error}", "warning")

    def _train_seconds(self) -> float:
        return self._before + time.monotonic() - self._began


def _whole(weight: Tensor) -> Tensor:
    """A weight without gradients; of shards, by a collective that every rank enters."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _progress(trainer: Trainer) -> float:
    """Share of the training that is done, as far as its end is known."""
    epochs, steps = trainer.max_epochs or 0, trainer.max_steps
    by_epochs = (trainer.current_epoch + 1) / epochs if epochs > 0 else 0.0
    by_steps = trainer.global_step / steps if steps > 0 else 0.0
    return min(1.0, max(by_epochs, by_steps))
