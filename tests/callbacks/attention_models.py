"""Models that call attention in every way, and what it must be, worked out explicitly."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.utils.data import DataLoader, TensorDataset

from lightning_diag.lightning import LightningModule

WIDTH, TOKENS = 16, 7


class Dots(nn.Module):
    """Calls dot product attention itself, and keeps what it called it with."""

    def __init__(
        self, heads: int = 4, key_heads: int = 4, call: Any = None, **options: Any
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.options = heads, key_heads, options
        size = WIDTH // heads
        self.q = nn.Linear(WIDTH, heads * size)
        self.k = nn.Linear(WIDTH, key_heads * size)
        self.v = nn.Linear(WIDTH, key_heads * size)
        self.call = call or F.scaled_dot_product_attention
        self.seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for p in (self.k, self.v))
        options = dict(self.options) | ({} if mask is None else {"attn_mask": mask})
        if self.heads != self.key_heads:
            options["enable_gqa"] = True
        self.seen.append((q.detach().double(), k.detach().double(), options))
        return self.call(q, k, v, **options).transpose(1, 2).flatten(2)


def entropies(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """Entropy of every row, ``(batch, heads, T)``, by the definition."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = options.get("scale") or 1 / math.sqrt(q.shape[-1])
    s = scale * q @ k.transpose(-1, -2)
    if options.get("is_causal"):
        s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -math.inf)
    mask = options.get("attn_mask")
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    p = s.softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)


def weights_of(mha: nn.MultiheadAttention, *inputs: Tensor, **masks: Tensor) -> Tensor:
    """Weights by head of a copy in double precision, without dropout."""
    twin = copy.deepcopy(mha).double().eval()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    with torch.no_grad():
        return twin(
            *(x.detach().double() for x in inputs),
            need_weights=True,
            average_attn_weights=False,
            **masks,
        )[1]


class Trained(LightningModule):
    """Trains one part on random tokens; what it gives is drawn to zero."""

    def __init__(self, part: nn.Module, call: Any = None) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.part = part
        self.call = call or (lambda part, x: part(x))
        self.losses: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        out = self.call(self.part, self.embed(batch[0]))
        return (out[0] if isinstance(out, tuple) else out).float().square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Everything(nn.Module):
    """All kinds of attention at once, with dropout and with a teacher that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        layer = {"d_model": WIDTH, "nhead": 4, "dim_feedforward": 16, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2)
        self.decoder = nn.TransformerDecoderLayer(**layer)
        self.dots = Dots(call=imported, dropout_p=0.1, is_causal=True)
        self.fusion = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        teacher = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 1)
        self.teacher = teacher.requires_grad_(False)
        self.late = nn.TransformerEncoderLayer(**layer)
        self.train()

    def train(self, mode: bool = True) -> "Everything":
        super().train(mode)
        self.teacher.eval()
        self.late.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.late(self.dots(self.decoder(self.encoder(x), x)))
        with torch.no_grad():
            target = self.teacher(x)
        fused, weights = self.fusion(y[:, :2], y, y)
        return fused.mean() + weights.square().mean() + (y - target).square().mean()


def tokens(count: int = 4, batch: int = 3) -> DataLoader:
    """Batches of short sequences."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count * batch, TOKENS, 3, generator=generator)
    return DataLoader(TensorDataset(x), batch_size=batch)
