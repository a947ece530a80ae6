"""Line graphs: a node a line, edges to the next line and from an assignment to its uses."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_diag.lightning import Callback, LightningModule, Trainer
from recipes.code.batches import Batch, EncodedFunctions, collate
from recipes.code.network import name_relations

__all__ = ["KINDS", "GraphStatistics", "LineGraph", "graph_statistics", "line_graph"]

KINDS = ("next_line", "previous_line", "def_use", "use_def")
_CHUNK = 256  # functions looked at together


class LineGraph(NamedTuple):
    """The graphs of a batch as one, nodes numbered function by function and line by line.

    Attributes:
        tokens: ``(tokens,)``, the ids of all tokens in the order of their nodes.
        offsets: ``(nodes,)``, where the tokens of each node begin.
        edges: ``(2, edges)``, from node and to node.
        kind: ``(edges,)``, an index into ``KINDS``.
        function: ``(nodes,)``, the function that each node belongs to.
    """

    tokens: Tensor
    offsets: Tensor
    edges: Tensor
    kind: Tensor
    function: Tensor


def line_graph(batch: Batch) -> LineGraph:
    """Read the graphs of a batch off its text.

    A name in front of ``=`` is assigned, anywhere else it is used, as for the transformer's bias:
    what lies between the two lines, such as a second assignment, plays no part. Each edge comes
    with its reverse; a line has no edge to itself.

    Args:
        batch: padded functions.

    Returns:
        The graph, edges sorted by kind.
    """
    number = batch.filled.flatten().cumsum(0).view_as(batch.filled) - 1
    present = batch.statement >= 0
    node = number.gather(1, batch.statement.clamp(min=0))[present]
    sizes = torch.bincount(node, minlength=int(batch.filled.sum()))
    follows = batch.filled[:, 1:]
    following = torch.stack([number[:, :-1][follows], number[:, 1:][follows]])
    function, use, definition = name_relations(batch)[:, 0].nonzero().unbind(dim=1)
    reached = torch.stack([number[function, definition], number[function, use]])
    reached = reached[:, use != definition]
    pairs = (following, following.flip(0), reached, reached.flip(0))
    kinds = [torch.full_like(pair[0], kind) for kind, pair in enumerate(pairs)]
    return LineGraph(
        tokens=batch.ids[present],
        offsets=sizes.cumsum(0) - sizes,
        edges=torch.cat(pairs, dim=1),
        kind=torch.cat(kinds),
        function=batch.filled.nonzero()[:, 0],
    )


def graph_statistics(functions: EncodedFunctions) -> dict[str, Any]:
    """What the graphs of some functions look like.

    Args:
        functions: at least one.

    Returns:
        ``graphs``, ``nodes``, ``nodes_per_graph`` (mean, min, max), ``edges`` by kind,
        ``degree`` (mean and max of the edges that leave a node, all kinds, and of ``def_use`` and
        ``use_def`` alone), ``isolated_share`` (nodes without any edge), ``nameless_share`` (nodes
        without one between lines that share a name) and ``classes`` (graphs by target).
    """
    nodes: list[Tensor] = []
    degrees: list[Tensor] = []
    for start in range(0, len(functions), _CHUNK):
        rows = [functions[i] for i in range(start, min(start + _CHUNK, len(functions)))]
        batch = collate(rows)
        graph = line_graph(batch)
        nodes.append(batch.filled.sum(dim=1))
        count = len(graph.function)
        degrees.append(
            torch.stack(
                [
                    torch.bincount(graph.edges[0, graph.kind == kind], minlength=count)
                    for kind in range(len(KINDS))
                ]
            )
        )
    sizes, degree = torch.cat(nodes), torch.cat(degrees, dim=1)
    named = degree[2:].sum(dim=0)
    return {
        "graphs": len(sizes),
        "nodes": int(sizes.sum()),
        "nodes_per_graph": {
            "mean": float(sizes.double().mean()),
            "min": int(sizes.min()),
            "max": int(sizes.max()),
        },
        "edges": {kind: int(degree[i].sum()) for i, kind in enumerate(KINDS)},
        "degree": {"all": _degree(degree.sum(dim=0)), "names": _degree(named)},
        "isolated_share": float((degree.sum(dim=0) == 0).double().mean()),
        "nameless_share": float((named == 0).double().mean()),
        "classes": {str(target): n for target, n in sorted(Counter(functions.targets).items())},
    }


class GraphStatistics(Callback):
    """Writes what the graphs look like into one JSON file, once a run.

    Args:
        path: the file; one that is there, as in a run that is resumed, is left alone.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        if not trainer.is_global_zero or self.path.exists():
            return
        found = {split: graph_statistics(data) for split, data in datasets.items() if len(data)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=2)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


def _degree(degree: Tensor) -> dict[str, float]:
    return {"mean": float(degree.double().mean()), "max": int(degree.max())}
