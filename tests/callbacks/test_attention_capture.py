"""Is attention seen whoever calls it, are its numbers right, and is training left alone?"""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.utils import checkpoint

from lightning_diag.callbacks.attention_capture import AttentionCapture
from tests.callbacks.attention_models import (
    TOKENS,
    WIDTH,
    Dots,
    Everything,
    Trained,
    entropies,
    tokens,
    weights_of,
)
from tests.callbacks.witness import fit, rows, scaler_plugin
from tests.promises.reads import WatchSteps


def capture(**arguments):
    return AttentionCapture(**{"every_n_steps": 1, "on_error": "raise", **arguments})


def module(part, call=None):
    torch.manual_seed(0)
    return Trained(part() if isinstance(part, type) else part, call)


def train(part, path, callbacks=(), *, call=None, **options):
    """Train from the same start; what was drawn at random is part of the losses."""
    trained = module(part, call)
    torch.manual_seed(5)
    fit(trained, list(callbacks), tokens(), path, max_steps=options.pop("max_steps", 4), **options)
    return trained


def assert_entropy(row, entropy, *, abs=1e-5):
    """A row's mean entropy is that of the rows with an allowed key."""
    there = entropy.isfinite()
    assert row["entropy"] == pytest.approx(entropy[there].mean().item(), abs=abs)
    assert row["rows"] == there.sum()
    assert row["masked"] == (~there).sum()


MASK = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) > 0.5
MASK[3] = False
MASK[0, 0] = True
ADDED = torch.randn(1, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2))

CALLS = {
    "plain": {},
    "imported": {"call": imported},
    "builtin": {"call": torch._C._nn.scaled_dot_product_attention},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.9},
    "dropout": {"dropout_p": 0.3},
    "grouped": {"key_heads": 2},
    "grouped_and_causal": {"key_heads": 1, "is_causal": True},
    "mask": {"attn_mask": MASK},
    "added": {"attn_mask": ADDED.masked_fill(~MASK, -math.inf)},
}


class TestDotProduct:
    @pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
    def test_entropy_is_that_of_an_explicit_softmax(self, options, tmp_path):
        trained = train(Dots(**options), tmp_path, [capture()], max_steps=2)
        for step, (q, k, called) in enumerate(trained.part.seen):
            entropy = entropies(q, k, called)
            (row,) = rows(tmp_path, "attention", step=step, component="part")
            assert_entropy(row, entropy)
            for head in rows(tmp_path, "attention_head", step=step):
                assert_entropy(head, entropy[:, head["head"]])
            assert (row["source"], row["heads"], row["queries"]) == ("sdpa", 4, TOKENS)
            assert row["all_keys"] == k.shape[-2]

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_under_every_precision(self, precision, tmp_path):
        part = Dots(is_causal=True)
        call = lambda part, x: part(x.to(next(part.parameters()).dtype))  # noqa: E731
        trained = train(part, tmp_path, [capture()], call=call, precision=precision, max_steps=1)
        (row,) = rows(tmp_path, "attention", component="part")
        assert_entropy(row, entropies(*trained.part.seen[0]))

    def test_the_model_counts_every_head_alike(self, tmp_path):
        train(Everything, tmp_path, [capture()], max_steps=1)
        heads = rows(tmp_path, "attention_head")
        (whole,) = rows(tmp_path, "attention", component=None)
        assert whole["heads"] == len(heads)
        for key in ("entropy", "entropy_normalized", "max", "sink_share", "mean"):
            want = sum(head[key] for head in heads) / len(heads)
            assert whole[key] == pytest.approx(want)

    def test_two_calls_of_one_module_are_apart_and_two_forwards_together(self, tmp_path):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.dots = Dots()

            def forward(self, x):
                x = self.dots(self.dots(x)).unsqueeze(1)
                x = F.scaled_dot_product_attention(x, x, x)
                return F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])

        trained = train(Twice, tmp_path, [capture()], max_steps=1)
        found = {row["component"]: row for row in rows(tmp_path, "attention")}
        assert set(found) == {"part", "part#2", "part.dots", None}
        assert found["part"]["keys"] == TOKENS
        assert found["part#2"]["keys"] == 3
        both = [entropies(*seen) for seen in trained.part.dots.seen]
        assert_entropy(found["part.dots"], torch.cat(both))

    def test_called_in_the_training_step_itself(self, tmp_path):
        def call(part, x):
            x = part(x).unsqueeze(1)
            return imported(x, x, x)

        train(nn.Linear(WIDTH, 4), tmp_path, [capture()], call=call, max_steps=1)
        assert len(rows(tmp_path, "attention", component="model")) == 1

    def test_samples_are_bounded(self, tmp_path):
        train(Dots(), tmp_path, [capture(max_rows=2, max_batch=1)], max_steps=1)
        assert rows(tmp_path, "attention", component="part")[0]["rows"] == 1 * 4 * 2

    def test_components_choose_modules(self, tmp_path):
        parts = {"own": "*.dots", "coder": ["part.encoder"]}
        train(Everything, tmp_path, [capture(components=parts)], max_steps=1)
        found = {row["component"]: row.get("part") for row in rows(tmp_path, "attention")}
        assert found.pop(None) is None
        assert found.pop("part.dots") == "own"
        assert set(found.values()) == {"coder"}
        assert len(found) == 2
        assert any("outside `components`" in note["message"] for note in rows(tmp_path, "notes"))


class TestMultihead:
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("masks", ["none", "padding", "mask", "both"])
    def test_with_and_without_weights(self, need_weights, batch_first, masks, tmp_path):
        padding = torch.arange(TOKENS).expand(3, -1) > torch.tensor([[6], [3], [1]])
        options = {}
        if masks in ("padding", "both"):
            options["key_padding_mask"] = padding if batch_first else padding[:1].repeat(7, 1)
        if masks in ("mask", "both"):
            options["attn_mask"] = ~MASK if batch_first else ~MASK[:3, :3]
        if masks != "none" and not batch_first and "key_padding_mask" in options:
            options["key_padding_mask"] = options["key_padding_mask"][:, :3]
        truth = []

        def call(part, x):
            truth.append(weights_of(part, x, x, x, **options))
            out = part(x, x, x, need_weights=need_weights, **options)[0]
            return out.nan_to_num()

        mha = nn.MultiheadAttention(WIDTH, 4, dropout=0.2, batch_first=batch_first)
        train(mha, tmp_path, [capture(max_batch=TOKENS)], call=call, max_steps=1)
        (row,) = rows(tmp_path, "attention", component="part")
        entropy = -torch.special.xlogy(truth[0], truth[0]).sum(-1)
        assert_entropy(row, entropy)
        assert row["source"] == ("softmax" if need_weights else "sdpa")
        sink = truth[0][..., 0]
        assert row["sink_share"] == pytest.approx(sink[~sink.isnan()].mean().item(), abs=1e-5)

    def test_layers_of_pytorch(self, tmp_path):
        train(Everything, tmp_path, [capture()], max_steps=1)
        assert {row["component"] for row in rows(tmp_path, "attention")} == {
            *("part.encoder.layers.0.self_attn", "part.encoder.layers.1.self_attn"),
            *("part.decoder.self_attn", "part.decoder.multihead_attn", "part.dots"),
            *("part.fusion", "part.late.self_attn", None),
        }

    def test_a_transform_is_passed_by(self, tmp_path):
        watched = [capture(capture={"fusion": "part.fusion"})]
        same(train(Mapped, tmp_path / "without"), train(Mapped, tmp_path / "with", watched))
        assert {row["component"] for row in rows(tmp_path / "with", "attention")} <= {None}
        (note,) = [n for n in rows(tmp_path / "with", "notes") if "torch.func" in n["message"]]
        assert "`part.dots`, `part.fusion`" in note["message"]
        assert note["severity"] == "info"

    def test_the_fast_path_is_left_alone_and_said(self, tmp_path):
        train(Everything, tmp_path, [capture()], max_steps=1)
        (note,) = [n for n in rows(tmp_path, "notes") if "fast path" in n["message"]]
        assert "`part.teacher`" in note["message"]
        assert note["severity"] == "info"


class Mapped(nn.Module):
    """Attention on each sample by itself, in one go."""

    def __init__(self):
        super().__init__()
        self.dots = Dots()
        self.dots.seen = Dropped()
        self.fusion = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def one(self, x):
        x = self.dots(x[None])
        return self.fusion(x, x, x)[0][0]

    def forward(self, x):
        # of the last call nothing belongs to a sample
        own = torch.func.vmap(lambda _: self.dots(x[:1]))(x)
        return torch.func.vmap(self.one)(x) + own.mean()


class Dropped(list):
    def append(self, value):
        pass


class Squared(nn.Module):
    """A product, of which a diagnostic makes many too."""

    def forward(self, x):
        return x * x * 3


class Checkpointed(nn.Module):
    """Runs its attention again in the backward pass, and saves some products (`selective`)."""

    def __init__(self, selective=False, reentrant=False):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), Dots(is_causal=True), Squared(), nn.Dropout(0.2)
        )
        self.options = {"use_reentrant": reentrant}
        if selective:
            products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
            products += [torch.ops.aten.bmm.default, torch.ops.aten.mul.Tensor]
            self.options["context_fn"] = lambda: checkpoint.create_selective_checkpoint_contexts(
                products
            )

    def forward(self, x):
        return checkpoint.checkpoint(self.inner, x, **self.options)


PARTS = {
    "everything": Everything,
    "checkpoint": Checkpointed,
    "reentrant": lambda: Checkpointed(reentrant=True),
    "selective": lambda: Checkpointed(selective=True),
}


class Manual(Trained):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def same(one, other):
    assert len(one.losses) == len(other.losses) > 0
    assert all(torch.equal(a, b) for a, b in zip(one.losses, other.losses, strict=True))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class TestTrainingIsLeftAlone:
    @pytest.mark.parametrize("kind", PARTS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"accumulate_grad_batches": 2, "max_steps": 2},
            {"precision": "bf16-mixed"},
            {"plugins": "scaler"},
        ],
        ids=str,
    )
    def test_bits_are_the_same(self, kind, options, tmp_path):
        def run(name, callbacks):
            plugins = {"plugins": [scaler_plugin()]} if "plugins" in options else {}
            torch.manual_seed(0)
            part = PARTS[kind]()
            return train(part, tmp_path / name, callbacks, **{**options, **plugins})

        watched = capture(maps=2, capture={"fusion": "part*"})
        same(run("without", []), run("with", [watched]))
        state = torch.get_rng_state()
        run("again", [])
        assert torch.equal(state, torch.get_rng_state())
        assert len(rows(tmp_path / "with", "attention", component=None)) >= 2
        assert rows(tmp_path / "with", "attention", component=None)[0]["captured"] > 0

    @pytest.mark.parametrize("kind", [Trained, Manual])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_what_is_computed_again_in_backward_counts_once(self, kind, reentrant, tmp_path):
        runs = []
        for name, callbacks in {"without": [], "with": [capture()]}.items():
            torch.manual_seed(0)
            trained = kind(Checkpointed(reentrant=reentrant))
            fit(trained, callbacks, tokens(), tmp_path / name)
            runs.append(trained)
        same(*runs)
        counts = [row["rows"] for row in rows(tmp_path / "with", "attention_head")]
        assert set(counts) == {3 * TOKENS}

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_parts_are_seen_and_not_compiled_again(self, backend, tmp_path):
        runs, graphs = [], []
        for name, callbacks in {"without": [], "with": [capture(every_n_steps=2)]}.items():
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.manual_seed(0)
            part = Everything()
            part.encoder = torch.compile(part.encoder, backend=backend)
            part.decoder.compile(backend=backend)
            runs.append(train(part, tmp_path / name, callbacks))
            graphs.append(dict(torch._dynamo.utils.counters["stats"]))
        same(*runs)
        assert graphs[0] == graphs[1]
        assert graphs[0]["unique_graphs"] >= 1
        assert {row["component"] for row in rows(tmp_path / "with", "attention")} == {
            *("part.encoder.layers.0.self_attn", "part.encoder.layers.1.self_attn"),
            *("part.decoder.self_attn", "part.decoder.multihead_attn", "part.dots"),
            *("part.fusion", None),
        }

    def test_a_compiled_model_gives_the_numbers_of_the_plain_one(self, tmp_path):
        train(Dots(is_causal=True), tmp_path / "plain", [capture()], max_steps=1)
        torch.manual_seed(0)
        part = torch.compile(Dots(is_causal=True), backend="aot_eager")
        train(part, tmp_path / "compiled", [capture()], max_steps=1)
        plain, compiled = (
            [{**row, "time": 0} for row in rows(tmp_path / name, "attention")]
            for name in ("plain", "compiled")
        )
        assert [row["component"] for row in compiled] == ["part", None]
        assert compiled[0]["heads"] == plain[0]["heads"]

    def test_one_read_and_ordinary_steps_cost_nothing(self, tmp_path):
        without, watch = WatchSteps(), WatchSteps()
        train(Everything, tmp_path / "without", [without])
        diagnostic = capture(every_n_steps=2, capture={"fusion": "part.fusion"})
        train(Everything, tmp_path / "with", [watch, diagnostic])
        assert len(watch.steps) == 4
        for number, (step, before) in enumerate(zip(watch.steps, without.steps, strict=True)):
            due = number % 2 == 1
            assert sum((step.reads - before.reads).values()) == due, step.reads
            assert bool(step.own_operations) == due
        assert [step.hooks for step in watch.steps] == [step.hooks for step in without.steps]

    def test_an_error_in_training_leaves_nothing_behind(self, tmp_path):
        class Fails(Dots):
            def forward(self, x):
                super().forward(x)
                raise ZeroDivisionError

        part = nn.Sequential(nn.Linear(WIDTH, WIDTH), Fails())
        before = F.scaled_dot_product_attention, F.softmax
        with pytest.raises(ZeroDivisionError):
            train(part, tmp_path, [capture()])
        assert torch._C._len_torch_function_stack() == 0
        assert (F.scaled_dot_product_attention, F.softmax) == before
        for one in part.modules():
            assert not one._forward_hooks
            assert not one._forward_pre_hooks

    def test_an_error_that_the_model_catches_confuses_no_names(self, tmp_path):
        class Fails(nn.Module):
            def forward(self, x):
                raise ZeroDivisionError

        class Catches(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Fails()

            def forward(self, x):
                with contextlib.suppress(ZeroDivisionError):
                    self.inner(x)
                x = x.unsqueeze(1)
                return F.scaled_dot_product_attention(x, x, x)

        train(Catches, tmp_path, [capture()], max_steps=1)
        assert {row["component"] for row in rows(tmp_path, "attention")} == {"part", None}

    def test_an_error_inside_ends_the_diagnostic_alone(self, tmp_path, monkeypatch):
        from lightning_diag.callbacks import attention_seen

        def fail(*args, **kwargs):
            raise ZeroDivisionError

        monkeypatch.setattr(attention_seen, "attention_sums", fail)
        without = train(Everything, tmp_path / "without")
        with pytest.warns(RuntimeWarning, match="AttentionCapture has ended"):
            other = train(Everything, tmp_path / "with", [capture(on_error="warn")])
        same(without, other)


class TestVerdicts:
    def planted(self, kind):
        """Four heads, of which the last is planted."""

        def call(part, x):
            x = part(x).unflatten(-1, (4, 4)).transpose(1, 2)
            q, k = 8 * x, x.clone()
            if kind == "uniform":
                k[:, 3] = 0
            if kind == "sink":
                q[:, 3], k[:, 3] = 1, 0
                k[:, 3, 0] = 1.5
            if kind == "peaked":
                q[:, 3], k[:, 3] = 0, 0
                q[:, 3] = 20 * torch.eye(TOKENS)[:, :4].roll(1, 0)
                q[:, 3, ..., 0] += 1
                k[:, 3, 1:5] = 10 * torch.eye(4)
            if kind == "duplicate":
                q[:, 3], k[:, 3] = q[:, 1], k[:, 1]
            return F.scaled_dot_product_attention(q, k, x)

        return call

    @pytest.mark.parametrize("kind", ["uniform", "sink", "peaked", "duplicate"])
    def test_a_planted_head_is_found(self, kind, tmp_path):
        part = nn.Linear(WIDTH, WIDTH)
        call = self.planted(kind)
        train(part, tmp_path, [capture()], call=call, max_steps=1)
        heads = rows(tmp_path, "attention_head")
        assert heads[3]["verdict"] == kind
        twins = {1, 3} if kind == "duplicate" else {3}
        assert {head["head"] for head in heads if head["verdict"] == kind} == twins
        (row,) = rows(tmp_path, "attention", component="model")
        assert row[f"heads_{kind}"] == len(twins)
        if kind == "duplicate":
            assert heads[3]["nearest_head"] == 1
            assert heads[1]["nearest_head"] == 3
            assert heads[3]["similarity"] == pytest.approx(1, abs=1e-5)

    def test_rows_without_a_choice_do_not_make_a_head_peaked(self, tmp_path):
        mask = torch.eye(TOKENS, dtype=torch.bool)
        mask[-1] = True
        train(Dots(attn_mask=mask), tmp_path, [capture()], max_steps=1)
        for head in rows(tmp_path, "attention_head"):
            assert head["peaked_share"] == pytest.approx(6 / 7)
            assert head["single"] == 3 * 6
            assert head["verdict"] in (None, "uniform")


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"top_keys": 0}, ValueError, "`top_keys` must be at least 1, got 0."),
            ({"max_rows": 0}, ValueError, "`max_rows` must be at least 1, got 0."),
            ({"max_batch": -1}, ValueError, "`max_batch` must be at least 1, got -1."),
            ({"maps": -1}, ValueError, "`maps` must be at least 0, got -1."),
            ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1"),
            ({"capture": "fusion"}, TypeError, "`capture` must be a mapping of names to globs"),
            ({"capture": {"a": 3}}, TypeError, "`capture` must map names to globs, got 'a': 3."),
            ({"key_names": ["a"]}, TypeError, "`key_names` must be a mapping of names to lists"),
            ({"key_names": {"a": "b"}}, TypeError, "`key_names` of `a` must be a list of names"),
            ({"query_names": {"a": []}}, ValueError, "`query_names` of `a` must hold at least one"),
        ],
    )
    def test_wrong_ones(self, arguments, error, message):
        with pytest.raises(error) as caught:
            AttentionCapture(**arguments)
        assert message in str(caught.value)

    def test_two_of_them_can_be_saved_together(self):
        first = AttentionCapture(every_n_steps=10)
        assert first.state_key != AttentionCapture(every_n_steps=20).state_key
        twin = AttentionCapture(every_n_steps=10)
        twin.load_state_dict(first.state_dict())

    def test_keys_for_loggers(self, tmp_path):
        trained = module(Dots())
        trainer = fit(trained, [capture()], tokens(), tmp_path)
        keys = {key for key in trainer.callback_metrics if key.startswith("attention/")}
        whole = {f"attention/{key}" for key in AttentionCapture.logged}
        assert keys == whole | {f"attention/part/{key}" for key in AttentionCapture.logged}
