import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_diag.lightning import Callback, Trainer
from recipes.code.batches import Batch, EncodedFunctions, collate
from recipes.code.data import CodeData
from recipes.code.gnn import CodeGNN, GraphBlock, focal_loss
from recipes.code.graphs import KINDS, GraphStatistics, graph_statistics, line_graph
from recipes.code.tokenizer import encode

NAMES = [f"v{i}" for i in range(6)]
# a line is the names that it assigns (one or none) and those that it uses
LINES = st.lists(
    st.tuples(st.sampled_from([None, *NAMES]), st.lists(st.sampled_from(NAMES), max_size=3)),
    min_size=1,
    max_size=9,
)


def tiny_gnn(**arguments) -> CodeGNN:
    small = {"vocabulary_size": 512, "width": 16, "layers": 3, "dropout": 0.0}
    return CodeGNN(**{**small, **arguments})


def functions(texts: list[str], targets: list[int] | None = None) -> EncodedFunctions:
    encoded = [encode(text, vocabulary_size=512, max_length=512) for text in texts]
    return EncodedFunctions(encoded, targets or [0] * len(texts))


def batch_of(texts: list[str]) -> Batch:
    rows = functions(texts)
    return collate([rows[i] for i in range(len(rows))])


def written(lines) -> str:
    calls = [f"f({', '.join(uses)})" for _, uses in lines]
    return "\n".join(
        call if name is None else f"{name} = {call}"
        for (name, _), call in zip(lines, calls, strict=True)
    )


def expected_edges(program, first: int = 0) -> Counter:
    """By brute force, and by what was put into the lines instead of by their text."""
    edges = Counter()
    assigned = {name for name, _ in program if name is not None}
    for i, (_, uses) in enumerate(program):
        for j, (name, _) in enumerate(program):
            if i != j and name in assigned.intersection(uses):
                edges["def_use", first + j, first + i] = 1
                edges["use_def", first + i, first + j] = 1
    for i in range(len(program) - 1):
        edges["next_line", first + i, first + i + 1] = 1
        edges["previous_line", first + i + 1, first + i] = 1
    return edges


def found_edges(graph) -> Counter:
    triples = zip(graph.kind.tolist(), *graph.edges.tolist(), strict=True)
    return Counter((KINDS[kind], one, two) for kind, one, two in triples)


def test_edges_by_hand():
    graph = line_graph(batch_of(["a = 1\nb = a\nrun(b)"]))
    assert found_edges(graph) == Counter(
        [
            *[("next_line", 0, 1), ("next_line", 1, 2)],
            *[("previous_line", 1, 0), ("previous_line", 2, 1)],
            *[("def_use", 0, 1), ("def_use", 1, 2), ("use_def", 1, 0), ("use_def", 2, 1)],
        ]
    )
    assert graph.function.tolist() == [0, 0, 0]
    assert graph.offsets.tolist() == [0, 4, 8]


@given(st.lists(LINES, min_size=1, max_size=4))
@settings(max_examples=60)
def test_edges_agree_with_brute_force(programs):
    graph = line_graph(batch_of([written(program) for program in programs]))
    expected, first = Counter(), 0
    for program in programs:
        expected += expected_edges(program, first)
        first += len(program)
    assert found_edges(graph) == expected
    owners = [i for i, program in enumerate(programs) for _ in program]
    assert graph.function.tolist() == owners
    tokens = batch_of([written(program) for program in programs]).ids
    assert graph.tokens.tolist() == [token for row in tokens.tolist() for token in row if token]


def test_a_function_of_one_line_is_isolated():
    graph = line_graph(batch_of(["a = a"]))
    assert graph.edges.shape == (2, 0)
    assert graph.function.tolist() == [0]
    assert tiny_gnn().eval()(batch_of(["a = a"])).isfinite().all()


def test_padding_changes_nothing():
    model = tiny_gnn().eval()
    long = "\n".join(f"b{i} = b{i - 1} + {i}" for i in range(30))
    alone, together = model(batch_of(["a = 1\nf(a)"])), model(batch_of([long, "a = 1\nf(a)"]))
    torch.testing.assert_close(together[1], alone[0])


def test_a_line_is_the_normalized_sum_of_its_tokens():
    model = tiny_gnn().eval()
    batch = batch_of(["a = 1\nrun(a, a)", "x"])
    lines = model.embedding(line_graph(batch))
    weight = model.embedding.token.weight
    rows = [
        torch.stack([weight[i] for i in batch.ids[b][batch.statement[b] == s]]).sum(0)
        for b, s in ((0, 0), (0, 1), (1, 0))
    ]
    expected = torch.nn.functional.layer_norm(torch.stack(rows), (16,))
    torch.testing.assert_close(lines, expected, atol=1e-5, rtol=1e-5)


def test_a_block_agrees_with_its_formula_in_numpy():
    torch.manual_seed(0)
    block = GraphBlock(4, 0.0, 0.25).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    edges = [torch.tensor([[0, 1, 2, 0], [1, 2, 2, 2]]) for _ in KINDS]
    edges[1] = torch.zeros(2, 0, dtype=torch.long)
    result = block(x, edges).detach().numpy()
    values = x.numpy()
    h = (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-5)
    mixed = h @ block.own.weight.detach().numpy().T + block.own.bias.detach().numpy()
    for k, along in enumerate(edges):
        for node in range(5):
            heard = [h[one] for one, two in along.T.tolist() if two == node]
            if heard:
                weight = block.kinds[k].lin_l.weight.detach().numpy()
                mixed[node] += block.strength[k].item() * weight @ np.mean(heard, axis=0)
    np.testing.assert_allclose(result, values + np.maximum(mixed, 0), rtol=1e-10)
    assert block.strength.tolist() == [0.25, 0.25, 1.0, 1.0]


def test_names_matter_through_the_edges_alone():
    """Where all tokens are alike, only the edges can tell which lines share a name."""
    model = tiny_gnn(order_strength=0.0).eval()
    torch.nn.init.uniform_(model.encoder.blocks[0].own.bias)
    with torch.no_grad():
        model.embedding.token.weight.copy_(torch.randn(16).expand(512, 16))
        model.embedding.norm.bias.normal_()
    linked, apart = (
        model(batch_of(["a = 1\nb = a\nc = b"])),
        model(batch_of(["a = 1\nb = x\nc = y"])),
    )
    torch.testing.assert_close(model(batch_of(["p = 1\nq = p\nr = q"])), linked)
    assert not torch.allclose(linked, apart)


@given(
    st.lists(st.tuples(*[st.floats(-30, 30)] * 2), min_size=1, max_size=5),
    st.floats(0, 4),
    st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
)
def test_the_focal_loss_agrees_with_its_formula_in_double_precision(rows, gamma, weight):
    target = [i % 2 for i in range(len(rows))]
    logits = np.array(rows, dtype=np.float64)
    # 1 - p as the probability of the other class, which loses no digits
    gap = np.array([row[1 - t] - row[t] for row, t in zip(logits, target, strict=True)])
    log_p, other = -np.logaddexp(0, gap), 1 / (1 + np.exp(-gap))
    w = np.array([weight[t] for t in target])
    expected = (w * other**gamma * -log_p).sum() / w.sum()
    found = focal_loss(
        torch.tensor(rows), torch.tensor(target), gamma=gamma, weight=torch.tensor(weight)
    )
    # logits of 30 in single precision leave ln p an error of some millionths
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_without_gamma_it_is_cross_entropy():
    logits, target = torch.randn(7, 2), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    weight = torch.tensor([1.0, 3.0])
    expected = torch.nn.functional.cross_entropy(logits, target, weight=weight)
    torch.testing.assert_close(focal_loss(logits, target, gamma=0.0, weight=weight), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
def test_the_gradient_is_finite_where_all_is_told_apart(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0]), gamma=gamma, weight=torch.ones(2)).backward()
    assert logits.grad.isfinite().all()


def test_statistics_by_brute_force():
    programs = [[("v0", []), ("v1", ["v0"]), (None, ["v1", "v0"])], [(None, [])]]
    data = functions([written(program) for program in programs], [1, 0])
    found = graph_statistics(data)
    assert found["graphs"] == 2
    assert found["nodes"] == 4
    assert found["nodes_per_graph"] == {"mean": 2.0, "min": 1, "max": 3}
    assert found["edges"] == {"next_line": 2, "previous_line": 2, "def_use": 3, "use_def": 3}
    assert found["degree"] == {"all": {"mean": 2.5, "max": 4}, "names": {"mean": 1.5, "max": 2}}
    assert found["isolated_share"] == 0.25
    assert found["nameless_share"] == 0.25
    assert found["classes"] == {"0": 1, "1": 1}


def test_statistics_of_many_chunks_are_those_of_all():
    texts = [written([("v0", []), (None, ["v0"] * (i % 3))]) for i in range(600)]
    found = graph_statistics(functions(texts))
    assert found["edges"]["def_use"] == sum(i % 3 > 0 for i in range(600))
    assert found["graphs"] == 600


@pytest.fixture
def data(tmp_path, known_hosts) -> CodeData:
    return CodeData(
        samples=300,
        cache_dir=str(tmp_path),
        vocabulary_size=512,
        batch_size=32,
        weighting="weighted_sampler",
    )


def test_a_training_run_writes_the_statistics_once(data, quiet, tmp_path):
    path = tmp_path / "run" / "graph_statistics.json"
    model = tiny_gnn()
    trainer = Trainer(
        **{**quiet, "max_epochs": 2}, logger=False, callbacks=[GraphStatistics(str(path))]
    )
    trainer.fit(model, datamodule=data)
    found = json.loads(path.read_text())
    assert set(found) == {"train", "val", "test"}
    assert found["train"]["graphs"] == len(data.datasets["train"])
    assert found["train"]["edges"]["def_use"] > found["train"]["graphs"]
    assert [file.name for file in path.parent.iterdir()] == ["graph_statistics.json"]
    path.write_text("{}")
    GraphStatistics(str(path)).on_fit_start(trainer, model)
    assert path.read_text() == "{}"
    assert model.class_weights.tolist() == [1.0, 1.0]  # the sampler weighs, and it alone
    names = ["loss", "f1", "precision", "recall", "accuracy", "auc", "auc_within_injected"]
    assert {f"val_{name}" for name in names} <= set(trainer.callback_metrics)
    assert [name for name, child in model.named_children() if list(child.parameters())] == [
        "embedding",
        "encoder",
        "head",
    ]


def test_every_parameter_learns_in_a_step(quiet):
    """But the rows of tokens that do not occur."""
    texts = ["a = input()\nb = a\nos.system(b)", "a = 1\nb = a\nlog(b)"]
    model = tiny_gnn(layers=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = functions(texts, [1, 0])
    Trainer(**quiet, logger=False).fit(model, DataLoader(rows, batch_size=2, collate_fn=collate))
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_thirty_two_functions_are_learnt_by_heart(corpus, quiet):
    torch.manual_seed(0)
    injected = [sample for sample in corpus if sample.injected][:32]
    rows = functions([s.func for s in injected], [s.target for s in injected])
    assert 5 < sum(rows.targets) < 27
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    trainer = Trainer(
        **{**quiet, "max_epochs": 50}, logger=False, callbacks=[Losses()], gradient_clip_val=1.0
    )
    model = tiny_gnn(width=32, optimizer=partial(torch.optim.AdamW, lr=5e-3))
    trainer.fit(model, DataLoader(rows, batch_size=32, collate_fn=collate))
    assert losses[-1] < 0.3 * losses[0]
    assert losses[-1] < 0.05


def test_a_checkpoint_of_plain_values_brings_back_the_model(data, quiet, tmp_path):
    model = tiny_gnn(gamma=2.0)
    trainer = Trainer(**quiet, logger=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    again = CodeGNN.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    batch = batch_of(["a = input()\nb = a\nos.system(b)"])
    torch.testing.assert_close(again.eval()(batch), model.eval()(batch))
    assert again.gamma == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "`width` must be at least 1, got 0."),
        ({"layers": 0}, "`layers` must be at least 1, got 0."),
        ({"gamma": -1.0}, "`gamma` must be at least 0, got -1.0."),
        ({"warmup_share": 2.0}, "`warmup_share` must be between 0 and 1, got 2.0."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_gnn(**arguments)


def test_the_transformer_needs_no_graph_library():
    code = (
        "import sys, recipes.code.model, recipes.code.data, recipes.code.graphs;"
        "sys.exit('torch_geometric' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
