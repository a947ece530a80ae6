"""Sees each operator of a forward as it runs: floating point operations, and what stays."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["OperatorCount"]

_aten = torch.ops.aten
# what a tensor subclass asks about itself: it must be left to the subclass
_QUESTIONS = frozenset(
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        *(("is_contiguous", "default"), ("is_contiguous", "memory_format")),
        *(("is_strides_like_format", "default"), ("is_non_overlapping_and_dense", "default")),
        *(("size", "default"), ("sym_size", "default"), ("stride", "default")),
        *(("sym_stride", "default"), ("storage_offset", "default"), ("numel", "default")),
        *(("sym_storage_offset", "default"), ("sym_numel", "default"), ("dim", "default")),
    )
) | {torch.ops.prim.layout.default}
# kernels that do the work of one that PyTorch has a formula for
_ALIKE = {
    "_scaled_dot_product_flash_attention_for_cpu": _aten._scaled_dot_product_flash_attention,
    "_scaled_dot_product_fused_attention_overrideable": (_aten._scaled_dot_product_flash_attention),
}


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; every operator runs just as it would without.

    It is meant for a forward alone: in a backward pass a dispatch mode makes PyTorch add up
    gradients in another way, with the same values in other memory.

    Attributes:
        flops: Floating point operations by owner; a multiplication and an addition are two.
        peaks: Most memory of a CUDA device that was in use after an operator, beyond what was in
            use when the owner began, in bytes.
        uncounted: Operators whose formula failed.
        uncounted: Operators whose formula failed.

    Args:
        owner: Says whose the operator is that just ran, and how many bytes were in use when that
            one began.
        guard: Isolates the counting, as `Diagnostic.guarded` does.
        allocated: Bytes of the device that are in use now; None where nobody counts them.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        owner: Callable[[], tuple[Hashable, int]],
        guard: Callable[[Callable[..., Any]], Callable[..., Any]],
        allocated: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[Hashable] = Counter()
        self.peaks: dict[Hashable, int] = {}
        self.uncounted: set[str] = set()
        self._owner = owner
        self._allocated = allocated
        self._saw = guard(self._see)
        self._created: dict[StorageWeakRef, tuple[Hashable, int]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # a function of the user that is compiled stays so, and is compiled as it would be
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS:
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._saw(func, args, kwargs, result)
        return result

    def held(self) -> Counter[Hashable]:
        """Bytes by owner that were made while this was entered and are still there.

        Asked when the forward is over, this is what it keeps for the backward pass, and its
        results. Parameters, buffers and inputs were not made; views share what they look at.
        """
        held: Counter[Hashable] = Counter()
        for reference, (owner, size) in self._created.items():
            if not reference.expired():  # type: ignore[no-untyped-call]
                held[owner] += size
        return held

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            return
        owner, base = self._owner()
        packet = func._overloadpacket
        self.flops[owner] += self._operations(packet, args, kwargs, result)
        results = result if isinstance(result, tuple | list) else (result,)
        for made, declared in zip(results, func._schema.returns, strict=False):
            if declared.alias_info is None:
                self._keep(made, owner)
        if self._allocated is not None:
            self.peaks[owner] = max(self.peaks.get(owner, 0), self._allocated() - base)

    def _operations(self, packet: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> int:
        formula = flop_registry.get(_ALIKE.get(packet.__name__, packet))
        try:
            return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        except Exception:
            # a formula may not know every kind of tensor
            self.uncounted.add(packet.__name__)
            return 0

    def _keep(self, made: object, owner: Hashable) -> None:
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            # what declares no alias may share all the same: it was made by whoever came first
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._created.setdefault(reference, (owner, storage.nbytes()))
