"""What the components of the forecaster do.

Bodies reach a target through `CelestialToTargetAttention` alone. Until then every body's vector is
made of that body's series, and of no other: so what attention gives no weight to is not used.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CelestialToTargetAttention",
    "Decoder",
    "FusionCrossAttention",
    "GraphCombiner",
    "PatchingComposer",
    "StochasticLearner",
]


class PatchingComposer(nn.Module):
    """Each series on its own, cut into patches at several scales, a vector a patch.

    The coarsest scale is the whole window: its vector comes first.

    Args:
        nodes: Number of series.
        features: Numbers of each at a time.
        context: Times in the window.
        patches: Lengths of the patches, in times.
        width: Length of the vectors.
    """

    def __init__(
        self, nodes: int, features: int, context: int, patches: Sequence[int], width: int
    ) -> None:
        super().__init__()
        self.patches = (context, *sorted(patches, reverse=True))
        self.embed = nn.ModuleList(nn.Linear(patch * features, width) for patch in self.patches)
        tokens = sum(context // patch for patch in self.patches)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.node = nn.Parameter(0.02 * torch.randn(nodes, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Turn ``(batch, context, nodes, features)`` into ``(batch, nodes, tokens, width)``."""
        series = x.transpose(1, 2)
        tokens = []
        for patch, embed in zip(self.patches, self.embed, strict=True):
            count = series.shape[2] // patch
            latest = series[:, :, -count * patch :]
            cut = latest.reshape(*series.shape[:2], count, -1)
            tokens.append(embed(cut))
        composed: Tensor = torch.cat(tokens, dim=2) + self.place + self.node
        return composed


class FusionCrossAttention(nn.Module):
    """A series asks its own patches of all scales: one query a series, the whole window's vector.

    Args:
        width: Length of the vectors.
        heads: Attention heads.
        dropout: Share of weights dropped in training, 0 to 1.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix ``(batch, nodes, tokens, width)`` into ``(batch, nodes, 4 * width)``.

        That is, side by side: the whole window's vector, mean and deviation over the patches, and
        what attention found.
        """
        flat = tokens.flatten(0, 1)
        keys = self.key_norm(flat)
        found, _ = self.attention(self.query_norm(flat[:, :1]), keys, keys, need_weights=False)
        base, deviation = tokens[:, :, 0], tokens.var(dim=2, unbiased=False).add(1e-6).sqrt()
        found = found.view_as(base)
        return torch.cat([base, tokens.mean(dim=2), deviation, found], dim=-1)


class StochasticLearner(nn.Module):
    """A graph of chances: an edge from body to target is there with a probability that is learnt.

    In training edges are drawn, softly enough for gradients to pass; in evaluation the probability
    itself stands for the edge.

    Args:
        targets: Number of targets.
        bodies: Number of bodies.
        expected: Edges a target, as the prior has it.
        temperature: Of the draw; the smaller, the closer to 0 and 1.

    References:
        Maddison, Mnih, Teh (2017), The Concrete Distribution, https://arxiv.org/abs/1611.00712,
        appendix B.
    """

    def __init__(
        self, targets: int, bodies: int, expected: float, temperature: float = 0.5
    ) -> None:
        super().__init__()
        self.prior = min(expected / bodies, 0.5)
        self.temperature = temperature
        start = math.log(self.prior / (1 - self.prior))
        self.logits = nn.Parameter(torch.full((targets, bodies), start))

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Edges ``(batch, targets, bodies)``, and the divergence from the prior, nats an edge."""
        p = self.logits.sigmoid()
        q = self.prior
        divergence = p * (F.logsigmoid(self.logits) - math.log(q)) + (1 - p) * (
            F.logsigmoid(-self.logits) - math.log(1 - q)
        )
        if not self.training:
            return p.expand(batch, -1, -1), divergence.mean()
        uniform = torch.rand(batch, *p.shape, device=p.device).clamp(1e-6, 1 - 1e-6)
        drawn = (self.logits + uniform.logit()) / self.temperature
        return drawn.sigmoid(), divergence.mean()

    def diagnostics(self) -> dict[str, Tensor]:
        """For `ComponentProfiler`: the edges that a target is expected to have."""
        return {"expected_edges": self.logits.sigmoid().sum(dim=1)}


class GraphCombiner(nn.Module):
    """Three graphs from bodies to targets become one, in shares that each target's state decides.

    They are a fixed one that is learnt, one that compares states of the moment, and the drawn one.

    Args:
        targets: Number of targets.
        bodies: Number of bodies.
        width: Length of the vectors.
    """

    def __init__(self, targets: int, bodies: int, width: int) -> None:
        super().__init__()
        self.fixed = nn.Parameter(torch.zeros(targets, bodies))
        self.from_target = nn.Linear(width, width)
        self.from_body = nn.Linear(width, width, bias=False)
        self.shares = nn.Linear(width, 3)

    def forward(self, target: Tensor, body: Tensor, drawn: Tensor) -> Tensor:
        """Edges ``(batch, targets, bodies)``, 0 to 1."""
        scores = self.from_target(target) @ self.from_body(body).mT
        now = (scores / math.sqrt(target.shape[-1])).sigmoid()
        graphs = torch.stack([self.fixed.sigmoid().expand_as(now), now, drawn], dim=-1)
        shares = self.shares(target).softmax(dim=-1)
        edges: Tensor = (graphs * shares.unsqueeze(2)).sum(dim=-1)
        return edges


class CelestialToTargetAttention(nn.Module):
    r"""Each target chooses among the bodies, with a query and a gate of its own.

    .. math::
        a_m = \mathrm{softmax}(q_m K^\top / \sqrt{d} + \beta E_m), \qquad
        c_m = O_m \left(\sum_b a_{mb} v_b + \sigma \epsilon\right), \qquad t_m + g_m c_m

    Weight is scarce, and has to be spent where it counts: every number of a body's value
    :math:`v_b` has unit variance over the batch, whatever the body, and in training the sum passes
    through noise of a fixed size. A body that gets little weight arrives in noise, and no later
    layer can bring it back by making it larger. For a target that is a sum of independent parts of
    deviation :math:`c_b`, the error :math:`\sigma^2 \sum_b c_b^2 / a_b^2` is least at
    :math:`a_b \propto c_b^{2/3}`: the body that counts most gets most, and one that does not
    count gets none.

    Args:
        targets: Number of targets.
        bodies: Number of bodies.
        width: Length of the vectors.
        heads: Attention heads; with one, weight is all that tells bodies apart.
        edge_scale: Extra score :math:`\beta` of an edge that is certainly there.
        noise: Deviation :math:`\sigma` of the noise in training.
    """

    def __init__(
        self, targets: int, bodies: int, width: int, heads: int, edge_scale: float, noise: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.edge_scale = edge_scale
        self.noise = noise
        self.target_norm = nn.LayerNorm(width)
        # biases here would shift all scores of a row alike, and never get a gradient
        self.body_norm = nn.LayerNorm(width, bias=False)
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(targets))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Parameter(torch.randn(bodies, width, width) / math.sqrt(width))
        self.value_norm = nn.BatchNorm1d(bodies * width, affine=False)
        self.output = nn.ModuleList(nn.Linear(width, width) for _ in range(targets))
        self.gate = nn.ModuleList(_gate(width) for _ in range(targets))

    def forward(
        self, target: Tensor, body: Tensor, edges: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give each target what it takes from the bodies.

        Args:
            target: Shape ``(batch, targets, width)``.
            body: Shape ``(batch, bodies, width)``.
            edges: Shape ``(batch, targets, bodies)``.
            hidden: Where a target must not look, ``(targets, bodies)``.

        Returns:
            Targets ``(batch, targets, width)``, and weights ``(batch, heads, targets, bodies)``.
        """
        asking, offered = self.target_norm(target), self.body_norm(body)
        query = torch.stack([q(asking[:, m]) for m, q in enumerate(self.query)], dim=1)
        q, k = self._by_head(query), self._by_head(self.key(offered))
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + self.edge_scale * edges.unsqueeze(1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(dim=-1)
        value = torch.einsum("bnw,nwv->bnv", body, self.value)
        value = self.value_norm(value.flatten(1)).view_as(value)
        found = (weights @ self._by_head(value)).transpose(1, 2).flatten(2)
        if self.training:
            found = found + self.noise * torch.randn_like(found)
        taken = []
        for m, (output, gate) in enumerate(zip(self.output, self.gate, strict=True)):
            message = output(found[:, m])
            opened = gate(torch.cat([asking[:, m], message], dim=-1))
            taken.append(target[:, m] + opened * message)
        return torch.stack(taken, dim=1), weights

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Decoder(nn.Module):
    """A target's vector becomes its next hours: a straight line and a small net, added.

    Args:
        width: Length of the vectors.
        horizon: Times to come.
        dropout: Share of numbers dropped in training, 0 to 1.
    """

    def __init__(self, width: int, horizon: int, dropout: float) -> None:
        super().__init__()
        self.line = nn.Linear(width, horizon)
        self.net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, horizon),
        )

    def forward(self, target: Tensor) -> Tensor:
        """Turn ``(batch, targets, width)`` into ``(batch, horizon, targets)``."""
        future: Tensor = (self.line(target) + self.net(target)).transpose(1, 2)
        return future


def _gate(width: int) -> nn.Sequential:
    last = nn.Linear(width, width)
    nn.init.xavier_uniform_(last.weight, gain=0.1)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), last, nn.Sigmoid())
