"""What CollapseStop collects over the micro-batches of one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_diag.callbacks.collapse_rows import RawRows, as_read, raw_rows, step_values
from lightning_diag.callbacks.optimizers import gradient_scaler, own_parameters, unscales_itself
from lightning_diag.functional.collapse_stop import (
    ABSENT,
    gradient_squares,
    prediction_numbers,
    step_numbers,
)
from lightning_diag.lightning import Trainer

__all__ = ["Finder", "Found", "Predictions", "Window"]

Predictions = Callable[[Any, Any], tuple[Tensor, Tensor | None]]


class Found(NamedTuple):
    """What a batch has given, as far as it could be found."""

    loss: Tensor | None
    logits: Tensor | None
    targets: Tensor | None


class Finder(NamedTuple):
    """Finds loss, predictions and labels, see the arguments of `CollapseStop`."""

    logits_key: str
    target_key: str
    predictions: Predictions | None

    def find(self, outputs: Any, batch: Any) -> Found:
        """Look into what ``training_step`` returned, and into the batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        logits, targets = self._predicted(outputs, batch)
        values = (loss, logits, targets)
        return Found(*(value if isinstance(value, Tensor) else None for value in values))

    def _predicted(self, outputs: Any, batch: Any) -> tuple[Any, Any]:
        # a batch that `training_step` passed over leaves nothing
        empty = outputs is None or (isinstance(outputs, Mapping) and not outputs)
        if self.predictions is not None and not empty:
            with torch.no_grad():
                return self.predictions(outputs, batch)
        if not isinstance(outputs, Mapping):
            return None, None
        targets = outputs.get(self.target_key)
        if targets is None and isinstance(batch, Mapping):
            targets = batch.get(self.target_key)
        elif targets is None and isinstance(batch, list | tuple) and len(batch) > 1:
            targets = batch[1]
        return outputs.get(self.logits_key), targets


@dataclass
class Window:
    """One step that is to be judged.

    Args:
        step: The step.

    Attributes:
        began: Mark on the device where its measuring began.
        rate: The largest learning rate with which an optimizer made this step.
        failure: What went wrong, to be told to the other ranks.
    """

    step: int
    began: torch.cuda.Event | None = None
    rate: float | None = None
    failure: Exception | None = None
    _losses: list[Tensor] = field(default_factory=list)
    _predictions: list[Tensor] = field(default_factory=list)
    _squares: dict[int, Tensor] = field(default_factory=dict)
    _scale: Tensor | None = None
    _raw: list[RawRows | None] = field(default_factory=list)

    def has_gradients(self, index: int) -> bool:
        """Whether this optimizer's have been seen: a line search shows them several times."""
        return index in self._squares

    def add_outputs(self, found: Found, most: int, *, raw: bool) -> None:
        """Take what one micro-batch has given.

        Args:
            found: What it has given.
            most: Rows of its logits to look at.
            raw: Whether `values` will be asked for, and not `numbers`.
        """
        if found.loss is not None:
            self._losses.append(found.loss)
        if found.logits is None:
            return
        rows = raw_rows(found.logits, found.targets, most) if raw else None
        self._raw.append(rows)
        if rows is None:
            self._predictions.append(prediction_numbers(found.logits, found.targets, most))

    def add_gradients(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        index: int,
        *,
        shared: bool,
        whole: list[Tensor | None] | None,
    ) -> None:
        """Take one optimizer's gradients, before it makes its step.

        Args:
            trainer: The trainer.
            optimizer: Whose gradients.
            index: Its place among the optimizers of the trainer.
            shared: Whether the numbers of all ranks will be added, so that gradients which all of
                them hold count on the first alone.
            whole: Gradients without pending sums, where parameters are sharded.
        """
        scaler = gradient_scaler(trainer)
        if scaler is not None:
            # the public way to the scale that does not wait for the device
            self._scale = scaler.scale(torch.ones((), device=trainer.lightning_module.device))
        elsewhere = shared and trainer.global_rank > 0
        if elsewhere and whole is None:
            return
        gradients = whole or _gradients(optimizer)
        if elsewhere and not _is_flat(trainer):
            gradients = [
                x if x is None or isinstance(x, DTensor) else x.new_empty(0) for x in gradients
            ]
        if any(gradient is not None for gradient in gradients):
            divisor = self._scale if unscales_itself(optimizer) else None
            self._squares[index] = gradient_squares(gradients, divisor)

    def odd_on_host(
        self, trainer: Trainer, optimizer: Optimizer, index: int, losses: Sequence[Tensor]
    ) -> str | None:
        """What of a step under way is not finite, if anything is and the weights will take it.

        It is known on a CPU alone, where the numbers lie at hand: a device would have to be waited
        for.

        Args:
            trainer: The trainer.
            optimizer: Whose gradients.
            index: Its place among the optimizers of the trainer.
            losses: The losses so far.

        Returns:
            ``"nonfinite_loss"``, ``"nonfinite_gradient"``, or None.
        """
        if trainer.lightning_module.device.type != "cpu":
            return None
        found = "nonfinite_loss"
        if all(loss.device.type != "cpu" or isfinite(loss.item()) for loss in losses):
            found = "nonfinite_gradient"
            known = self._squares.get(index)
            # of gradients that all ranks hold, the first rank alone has counted the squares
            total = _largest(_gradients(optimizer)) if known is None else known.sum()
            if total.device.type != "cpu" or isfinite(total.item()):
                return None
        # what a scaler skips does the weights no harm: there is time to judge it first
        return found if self._scale is None or self._scale.item() <= 1 else None

    def numbers(self, trainer: Trainer) -> Tensor:
        """All of it in one vector on the device, see `step_numbers`.

        Raises:
            Exception: What went wrong before, if anything did.
        """
        if self.failure is not None:
            raise self.failure
        device = trainer.lightning_module.device
        return step_numbers(
            self._all_squares(trainer, device),
            torch.ones((), device=device) if self._scale is None else self._scale,
            self._losses,
            self._predictions,
            divided_by=_loss_divisor(trainer),
        )

    def values(self, trainer: Trainer) -> tuple[Tensor, Callable[[list[float]], list[float]]]:
        """The same on a CPU: one vector, and what makes of its values what `merge_steps` gives."""
        home = torch.device("cpu")
        squares = self._all_squares(trainer, home)
        numbers = iter(self._predictions)
        scale = squares.new_ones(1) if self._scale is None else self._scale
        losses = [loss.detach() for loss in self._losses]
        pieces = [scale, squares, *(x if x.numel() == 1 else x.double().mean() for x in losses)]
        for rows in self._raw:
            pieces += [next(numbers)] if rows is None else rows.tensors
        divided_by, raw = _loss_divisor(trainer), self._raw

        def finish(read: list[float]) -> list[float]:
            return step_values(read, len(squares), len(losses), raw, divided_by=divided_by)

        return as_read([x if x.device == home else x.to(home) for x in pieces]), finish

    def _all_squares(self, trainer: Trainer, device: torch.device) -> Tensor:
        wide = torch.float32 if device.type == "mps" else torch.float64
        squares = [
            self._squares[index]
            if index in self._squares
            else torch.full((len(own_parameters(one)),), ABSENT, dtype=wide, device=device)
            for index, one in enumerate(trainer.optimizers)
        ]
        if not squares:
            return torch.zeros(0, dtype=wide, device=device)
        return torch.cat([x if x.device == device else x.to(device) for x in squares])

    @staticmethod
    def size(trainer: Trainer) -> int:
        """How many numbers there will be, whatever is seen."""
        count = sum(len(own_parameters(optimizer)) for optimizer in trainer.optimizers)
        return len(step_numbers(torch.zeros(count), torch.ones(()), [], []))


def _gradients(optimizer: Optimizer) -> list[Tensor | None]:
    """Those of `own_parameters`, in their order."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # the optimizer itself allows a parameter to be there twice
    own = own if len(set(map(id, own))) == len(own) else own_parameters(optimizer)
    return [parameter.grad for parameter in own]


def _largest(gradients: list[Tensor | None]) -> Tensor:
    """The largest magnitude, NaN where there is one; of dense gradients."""
    dense = [x for x in gradients if type(x) is Tensor and x.layout == torch.strided and x.numel()]
    return torch.nn.utils.get_total_norm(dense, torch.inf)


def _loss_divisor(trainer: Trainer) -> int:
    # Lightning has divided what it hands over
    automatic = trainer.lightning_module.automatic_optimization
    return trainer.accumulate_grad_batches if automatic else 1


def _is_flat(trainer: Trainer) -> bool:
    return any(kind.__name__ == "FSDPStrategy" for kind in type(trainer.strategy).__mro__)
