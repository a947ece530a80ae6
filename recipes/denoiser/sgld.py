"""Stochastic gradient Langevin dynamics: gradient steps with noise of a temperature."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["SGLD"]


class SGLD(Optimizer):
    r"""Gradient descent that does not settle but samples, the wider the higher the temperature.

    .. math::
        \theta \leftarrow \theta - \eta g + \sqrt{2 \eta T} \, \xi, \quad \xi \sim N(0, 1)

    For small learning rates :math:`\eta` the weights are then distributed as
    :math:`\exp(-L / T)`. At temperature 0 it is `torch.optim.SGD` to the last bit.

    The noise is drawn from generators of its own, which follow from the seed, the step and the
    group: PyTorch's random numbers stay as they are, a resumed run goes on as it would have gone,
    and replicas on several devices draw the same.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        temperature: T; 0 for no noise.
        seed: of the noise.

    Raises:
        ValueError: an argument breaks a rule.

    References:
        Welling & Teh, 2011, Bayesian learning via stochastic gradient Langevin dynamics, ICML,
        equation 4, with a temperature.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        temperature: float = 0.0,
        seed: int = 42,
    ) -> None:
        for name, value in (("lr", lr), ("temperature", temperature)):
            if not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        self.seed = seed
        # the step is in the groups, since these are what a checkpoint holds
        super().__init__(params, {"lr": lr, "temperature": temperature, "step": 0})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: computes the loss and the gradients anew; None where they are there.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            generators: dict[torch.device, torch.Generator] = {}
            width = (2 * group["lr"] * group["temperature"]) ** 0.5
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.add_(parameter.grad, alpha=-group["lr"])
                if width > 0:
                    device = parameter.device
                    if device not in generators:
                        generators[device] = self._generator(device, group["step"], number)
                    parameter.add_(_normal(parameter, generators[device]), alpha=width)
            group["step"] += 1
        return loss

    def _generator(self, device: torch.device, step: int, group: int) -> torch.Generator:
        text = f"{self.seed} {step} {group}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return torch.Generator(device).manual_seed(seed)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
