"""What modules say of themselves: the results of their optional ``diagnostics()`` method."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_diag.components import module_names

__all__ = ["Internals", "reporting_modules"]

_PARTS = ("value", "min", "max")


def reporting_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a ``diagnostics()`` method, by name without wrapper prefixes.

    Args:
        model: The model; it may have one itself, under the name "".
    """
    names = module_names(model).items()
    # asked of the class: an attribute of a user's module may raise, or be whatever one asks for
    return {name: one for name, one in names if callable(getattr(type(one), "diagnostics", None))}


@dataclass
class _Entry:
    module: str
    name: str
    place: int
    width: int


class Internals:
    """Collects what modules return, as tensors on the device, and makes rows of it later.

    Args:
        device: Where the values are gathered.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._entries: list[_Entry] = []
        self._values: list[Tensor] = []
        self._numbers: list[tuple[str, str, float]] = []
        self.odd: list[str] = []

    def ask(self, name: str, module: nn.Module) -> None:
        """Call one module's ``diagnostics()`` and take note of its numbers.

        Args:
            name: The module's name.
            module: It returns a mapping of names to numbers or tensors, perhaps nested.

        Raises:
            TypeError: It returned something else.
        """
        method: Callable[[], object] = module.diagnostics  # type: ignore[assignment]
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            said = method()
            if said is None:
                return
            if not isinstance(said, Mapping):
                raise TypeError(
                    f"`diagnostics()` of `{name}` must return a mapping, got {type(said).__name__}."
                )
            for key, value in _flat(said):
                self._take(name, key, value)

    def values(self) -> Tensor:
        """All numbers of tensors, as one tensor on the device; a zero first."""
        nothing = torch.zeros(1, dtype=self._wide, device=self._device)
        return torch.cat([nothing, *self._values])

    def rows(
        self, values: list[float], owners: Callable[[str], str | None]
    ) -> list[dict[str, object]]:
        """Rows from the values that came back from the device.

        Args:
            values: What `values` gave, on the host.
            owners: Component of a module's name.
        """
        rows: list[dict[str, object]] = [
            {"component": owners(module), "module": module, "name": name, "value": number}
            for module, name, number in self._numbers
        ]
        for entry in self._entries:
            row: dict[str, object] = {"component": owners(entry.module), "module": entry.module}
            row["name"] = entry.name
            own = values[1 + entry.place : 1 + entry.place + entry.width]
            rows.append(row | dict(zip(_PARTS, own, strict=False)))
        return rows

    def _take(self, module: str, key: str, value: object) -> None:
        if isinstance(value, Tensor) and not value.is_complex() and value.numel():
            self._take_tensor(module, key, value)
        elif isinstance(value, int | float):
            self._numbers.append((module, key, float(value)))
        else:
            self.odd.append(f"`{key}` of `{module}`")

    def _take_tensor(self, module: str, key: str, value: Tensor) -> None:
        local = getattr(value, "to_local", None)
        x = (value if local is None else local()).detach().to_dense().reshape(-1).to(self._wide)
        x = x if x.numel() == 1 else torch.stack([x.mean(), *x.aminmax()])
        # from the host of a model on a device this is a copy the other way, which nothing waits for
        x = x if x.device == self._device else x.to(self._device, non_blocking=True)
        self._entries.append(_Entry(module, key, sum(v.numel() for v in self._values), x.numel()))
        self._values.append(x)


def _flat(said: Mapping[object, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in said.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
