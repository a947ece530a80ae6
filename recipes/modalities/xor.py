"""Views of which the last is the exclusive or of the others: any n - 1 of them tell nothing."""

from typing import Any

import torch
from torch import Tensor

from recipes.modalities.batches import ViewLoaders, Views, check_at_least

__all__ = ["XorData", "xor_views"]


class XorData(ViewLoaders):
    """Random bits in all views but the last, and their exclusive or, bit by bit, in the last.

    All bits are 0 or 1 with probability 1/2. Any n - 1 views are independent of each other, so
    nothing that looks at pairs can learn anything; all n together determine each of them.

    Args:
        n_views: number of views, at least 3.
        bits: numbers in each view.
        samples: things in the training split; validation and test have one gallery each.
        data_seed: of the bits; it stays when ``seed`` changes.
        gallery_size: things among which one is looked for, see `ViewLoaders`.
        batch_size: things in a batch of training, on each device.
        num_workers: processes that load batches.
        pin_memory: whether batches are put into page-locked memory.
        seed: of the order in which things are seen.

    Raises:
        ValueError: an argument breaks a rule.

    References:
        Saporta et al. 2024, Contrasting with Symile, https://arxiv.org/abs/2411.01053
    """

    def __init__(
        self,
        *,
        n_views: int = 3,
        bits: int = 16,
        samples: int = 8192,
        data_seed: int = 0,
        gallery_size: int = 256,
        batch_size: int = 128,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__(gallery_size, batch_size, num_workers, pin_memory, seed)
        check_at_least(3, n_views=n_views)
        check_at_least(1, bits=bits)
        check_at_least(2, samples=samples)
        self.n_views = n_views
        self.bits = bits
        self.samples = samples
        self.data_seed = data_seed
        self.view_sizes = {f"view_{k}": bits for k in range(n_views)}
        self.fingerprint: dict[str, Any] = {
            "name": "exclusive or",
            "parameters": f"{n_views} x {bits} bits, {samples} things, seed {data_seed}",
        }

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        generator = torch.Generator().manual_seed(self.data_seed)
        sizes = {"train": self.samples, "val": self.gallery_size, "test": self.gallery_size}
        for split, size in sizes.items():
            views = xor_views(size, self.n_views, self.bits, generator)
            self.datasets[split] = Views(views)


def xor_views(things: int, n_views: int, bits: int, generator: torch.Generator) -> list[Tensor]:
    """Bits as 0 and 1, in single precision.

    Args:
        things: number of rows.
        n_views: number of views.
        bits: numbers in each view.
        generator: draws the bits of all views but the last.

    Returns:
        The views, each ``(things, bits)``; their sum is even everywhere.
    """
    free = torch.randint(0, 2, (n_views - 1, things, bits), generator=generator)
    return [view.float() for view in (*free, free.sum(dim=0) % 2)]
