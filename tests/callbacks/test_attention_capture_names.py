"""What the user names, what other libraries call, what cannot be seen, and what is drawn."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

from lightning_diag import RunLogger
from tests.callbacks.attention_models import TOKENS, WIDTH, Dots, Trained, tokens, weights_of
from tests.callbacks.test_attention_capture import Manual, assert_entropy, capture, same, train
from tests.callbacks.witness import fit, lightning, rows

BODIES = ["sun", "moon", "mercury", "venus", "mars", "jupiter", "saturn"]


class HandMade(nn.Module):
    """Computes weights by itself, and hands them out in a tuple and as an attribute."""

    def __init__(self, heads=True):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.heads = heads
        self.latest = None
        self.seen = []

    def forward(self, x):
        q, k = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k))
        weights = (2 * q @ k.transpose(-1, -2)).softmax(-1)
        weights = weights if self.heads else weights.mean(1)
        self.seen.append(weights.detach().double())
        self.latest = {"weights": weights.detach()}
        mixed = (weights if self.heads else weights.unsqueeze(1)).mean(1) @ x
        return mixed, weights


class Outer(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x):
        for part in self.parts.values():
            out = part(x, x, x) if isinstance(part, nn.MultiheadAttention) else part(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


def notes(path, severity=None):
    found = rows(path, "notes", diagnostic="AttentionCapture")
    return [note["message"] for note in found if severity in (None, note["severity"])]


class TestCapture:
    @pytest.mark.parametrize("target", ["part.parts.hand", "*.hand", "part.parts.hand.latest"])
    @pytest.mark.parametrize("heads", [True, False])
    def test_weights_that_are_handed_out(self, target, heads, tmp_path):
        part = Outer(hand=HandMade(heads))
        train(part, tmp_path, [capture(capture={"fusion": target})], max_steps=1)
        (row,) = rows(tmp_path, "attention", component="fusion")
        p = part.parts.hand.seen[0]
        assert_entropy(row, -torch.special.xlogy(p, p).sum(-1))
        assert (row["source"], row["heads"]) == ("weights", 4 if heads else 1)
        assert not notes(tmp_path)

    def test_a_module_whose_attention_is_seen_keeps_its_numbers_under_the_name(self, tmp_path):
        truth = []

        class Fusion(Outer):
            def forward(self, x):
                truth.append(weights_of(self.parts["fusion"], x[:, :2], x, x))
                return self.parts["fusion"](x[:, :2], x, x)[0]

        part = Fusion(fusion=nn.MultiheadAttention(WIDTH, 4, dropout=0.2, batch_first=True))
        named = capture(
            capture={"fusion": "*.fusion"},
            key_names={"fusion": BODIES},
            query_names={"fusion": ["open", "close"]},
        )
        train(part, tmp_path, [named], max_steps=1)
        # the twin that computes the truth is called by the part itself
        found = {row["component"]: row for row in rows(tmp_path, "attention")}
        assert set(found) == {"part", "fusion", None}
        assert (found["fusion"]["source"], found["fusion"]["heads"]) == ("softmax", 4)
        targets = rows(tmp_path, "attention_query")
        assert [target["name"] for target in targets] == ["open", "close"]
        p = truth[0].numpy()
        for number, target in enumerate(targets):
            mean = p[:, :, number].mean((0, 1))
            best = np.argsort(-mean)[:5]
            assert [target[f"key_{rank}"] for rank in range(1, 6)] == best.tolist()
            assert [target[f"name_{rank}"] for rank in range(1, 6)] == [BODIES[i] for i in best]
            masses = [target[f"mass_{rank}"] for rank in range(1, 6)]
            assert masses == pytest.approx(mean[best].tolist(), abs=1e-5)
            entropy = -(p * np.log(p)).sum(-1)[:, :, number].mean()
            assert target["entropy"] == pytest.approx(entropy, abs=1e-5)
            assert target["max"] == pytest.approx(p.max(-1)[:, :, number].mean(), abs=1e-5)
            assert target["std"] == pytest.approx(mean.std(), abs=1e-5)
            assert target["mean"] == pytest.approx(1 / TOKENS)
        for head in rows(tmp_path, "attention_head", component="fusion"):
            mean = p[:, head["head"]].mean((0, 1))
            assert head["name_1"] == BODIES[mean.argmax()]

    def test_weights_that_are_computed_again_in_backward_count_once(self, tmp_path):
        class Saves(Outer):
            def forward(self, x):
                hand = self.parts["hand"]
                return checkpoint.checkpoint(lambda y: hand(y)[0], x, use_reentrant=True)

        torch.manual_seed(0)
        trained = Manual(Saves(hand=HandMade()))
        fit(trained, [capture(capture={"hand": "*.hand"})], tokens(), tmp_path, max_steps=1)
        assert len(trained.part.parts["hand"].seen) == 2
        assert rows(tmp_path, "attention", component="hand")[0]["rows"] == 3 * 4 * TOKENS

    def test_what_was_seen_is_not_searched_for_again(self, tmp_path):
        part = Outer(fusion=nn.MultiheadAttention(WIDTH, 4, batch_first=True))
        train(part, tmp_path, [capture(capture={"fusion": "*.fusion"})], max_steps=1)
        assert [row["component"] for row in rows(tmp_path, "attention")] == ["fusion", None]

    def test_more_queries_than_names_form_groups(self, tmp_path):
        queries = {"part": ["early", "late"]}
        train(Dots(), tmp_path, [capture(query_names=queries, max_batch=9)], max_steps=1)
        found = rows(tmp_path, "attention_query")
        assert [row["name"] for row in found] == ["early", "late"]
        # four of the seven queries lie in the first half
        assert [row["rows"] for row in found] == [3 * 4 * 4, 3 * 4 * 3]

    def test_calls_of_several_lengths_are_added_up(self, tmp_path):
        def call(part, x):
            return part(x[:, :2]).sum() + part(x).sum() + part(x[:, :4]).sum()

        train(Dots(), tmp_path, [capture(capture={"dots": "part"})], call=call, max_steps=1)
        found = rows(tmp_path, "attention_query")
        assert [row["rows"] for row in found] == [12 * n for n in (3, 3, 2, 2, 1, 1, 1)]
        assert sum(found[0][f"mass_{rank}"] for rank in range(1, 6)) < 1
        (row,) = rows(tmp_path, "attention", component="dots")
        assert row["rows"] == 12 * (2 + 7 + 4)
        assert row["queries"] == 7

    def test_more_names_than_queries(self, tmp_path):
        names = {"part": [f"target {i}" for i in range(TOKENS + 1)]}
        with pytest.warns(UserWarning, match="`query_names` of `part` must be no more than its 7"):
            train(Dots(), tmp_path, [capture(query_names=names)], max_steps=1)
        assert {row["name"] for row in rows(tmp_path, "attention_query")} == {None}

    def test_only_what_is_named_has_rows_by_query(self, tmp_path):
        part = Outer(one=Dots(), two=Dots())
        train(part, tmp_path, [capture(capture={"two": "*.two"})], max_steps=1)
        assert {row["component"] for row in rows(tmp_path, "attention_query")} == {"two"}
        assert {row["component"] for row in rows(tmp_path, "attention")} == {
            "part.parts.one",
            "two",
            None,
        }

    def test_several_modules_of_one_name(self, tmp_path):
        part = Outer(one=Dots(), two=Dots())
        train(part, tmp_path, [capture(capture={"mix": "part.parts.*"})], max_steps=1)
        found = {row["component"] for row in rows(tmp_path, "attention")}
        assert found == {"mix.part.parts.one", "mix.part.parts.two", None}

    def test_a_captured_module_is_looked_at_outside_of_components(self, tmp_path):
        named = capture(components={"other": "embed"}, capture={"hand": "*.hand"})
        train(Outer(hand=HandMade(), dots=Dots()), tmp_path, [named], max_steps=1)
        assert {row["component"] for row in rows(tmp_path, "attention")} == {"hand", None}


class TestNoSilence:
    def test_nothing_seen_is_said_once_and_recorded(self, tmp_path):
        with pytest.warns(UserWarning, match="AttentionCapture: no attention was seen"):
            train(nn.Linear(WIDTH, 2), tmp_path, [capture()])
        assert len(notes(tmp_path, "warning")) == 1
        whole = rows(tmp_path, "attention")
        assert [(row["component"], row["captured"]) for row in whole] == [(None, 0)] * 4
        assert whole[0]["entropy"] is None

    def test_a_captured_module_that_gives_nothing(self, tmp_path):
        part = Outer(dots=Dots(), plain=nn.Linear(WIDTH, WIDTH))
        with pytest.warns(UserWarning, match="gave nothing for `fusion`"):
            train(part, tmp_path, [capture(capture={"fusion": "*.plain"})], max_steps=1)
        assert len(rows(tmp_path, "attention")) == 2

    def test_names_that_match_nothing(self, tmp_path):
        wrong = capture(
            capture={"fusion": "part.parts.dotz"}, key_names={"part.parts.dot": ["a", "b"]}
        )
        train(Outer(dots=Dots()), tmp_path, [wrong], max_steps=1)
        said = notes(tmp_path, "warning")
        assert said[0] == (
            "`part.parts.dotz` of `capture` matches no module; did you mean `part.parts.dots`?"
        )
        assert said[1] == (
            "`part.parts.dot` of `key_names` matches nothing; did you mean `part.parts.dots`?"
        )

    def test_key_names_that_do_not_fit(self, tmp_path):
        train(Dots(), tmp_path, [capture(key_names={"part": ["a", "b"]})], max_steps=1)
        assert notes(tmp_path, "warning") == [
            "`key_names` of `part` must name its 7 keys, got 2 names; keys are numbered instead."
        ]
        assert "name_1" not in rows(tmp_path, "attention_query")[0]

    def test_what_a_transform_runs_is_passed_over_and_said(self, tmp_path):
        class Mapped(nn.Module):
            def forward(self, x):
                return torch.vmap(lambda y: F.scaled_dot_product_attention(y, y, y))(x)

        train(Outer(mapped=Mapped(), dots=Dots()), tmp_path, [capture()], max_steps=1)
        assert any("`torch.func`): `part.parts.mapped`" in message for message in notes(tmp_path))

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flexible_attention_is_passed_over_and_said(self, tmp_path):
        from torch.nn.attention.flex_attention import flex_attention

        class Flexible(nn.Module):
            def forward(self, x):
                with torch.no_grad():
                    y = flex_attention(*[x.unsqueeze(1)] * 3)
                return x + y.squeeze(1)

        part = Outer(flex=Flexible(), dots=Dots())
        call = lambda part, x: part(x.detach())  # noqa: E731
        train(part, tmp_path, [capture()], call=call, max_steps=1)
        assert any("(`flex_attention`): `part.parts.flex`" in note for note in notes(tmp_path))

    def test_rows_that_are_no_numbers(self, tmp_path):
        class Broken(nn.Module):
            def forward(self, x):
                q = x.unsqueeze(1).clone()
                q[0, 0, 2] = math.nan
                return F.scaled_dot_product_attention(q, x.unsqueeze(1), q).nan_to_num()

        train(Broken(), tmp_path, [capture()], max_steps=1)
        (row,) = rows(tmp_path, "attention", component="part")
        assert (row["nonfinite"], row["rows"]) == (1, 3 * TOKENS - 1)
        assert math.isfinite(row["entropy"])


class TestGraphs:
    @pytest.fixture(autouse=True)
    def _needs_it(self):
        pytest.importorskip("torch_geometric")

    def edges(self):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3 * TOKENS, (2, 60), generator=generator).unique(dim=1)

    @pytest.mark.parametrize("kind", ["GATConv", "GATv2Conv", "TransformerConv"])
    def test_convolutions(self, kind, tmp_path):
        import torch_geometric.nn as graph

        edges, handed = self.edges(), []
        part = getattr(graph, kind)(WIDTH, 4, heads=2, dropout=0.3)

        def call(part, x):
            x = x.reshape(-1, WIDTH)
            part.eval()
            with torch.no_grad():
                handed.append(part(x, edges, return_attention_weights=True)[1])
            part.train()
            return part(x, edges)

        one = train(part, tmp_path / "one", [capture()], call=call, max_steps=1)
        torch.manual_seed(0)
        (row,) = rows(tmp_path / "one", "attention", component="part")
        index, alpha = handed[0]
        alpha, target = alpha.double(), index[1]
        plogp = -torch.special.xlogy(alpha, alpha)
        entropy = torch.zeros(int(target.max()) + 1, 2, dtype=torch.float64)
        entropy = entropy.index_add(0, target, plogp)[target.bincount() > 0]
        assert row["entropy"] == pytest.approx(entropy.mean().item(), abs=1e-5)
        assert row["source"] == "graph"
        assert row["sink_share"] is None
        assert row["keys"] == pytest.approx(len(target) / len(entropy))
        assert one.losses[0].isfinite()

    def test_training_is_left_alone_and_the_name_put_back(self, tmp_path):
        from torch_geometric.nn import GATConv
        from torch_geometric.nn.conv import gat_conv
        from torch_geometric.utils import softmax

        edges, runs = self.edges(), []
        for name, callbacks in {"without": [], "with": [capture()]}.items():
            torch.manual_seed(0)
            part = GATConv(WIDTH, 4, heads=2, dropout=0.3)
            call = lambda part, x: part(x.reshape(-1, WIDTH), edges)  # noqa: E731
            runs.append(train(part, tmp_path / name, callbacks, call=call))
        same(*runs)
        assert gat_conv.softmax is softmax


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def _needs_it(self):
        pytest.importorskip("transformers")

    def model(self, implementation):
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attn_implementation=implementation,
        )
        return LlamaModel(config)

    def call(self, part, x):
        return part(inputs_embeds=x).last_hidden_state

    def test_the_sdpa_path(self, tmp_path):
        runs = []
        for name, callbacks in {"without": [], "with": [capture()]}.items():
            runs.append(
                train(self.model("sdpa"), tmp_path / name, callbacks, call=self.call, max_steps=2)
            )
        same(*runs)
        names = [f"part.layers.{layer}.self_attn" for layer in range(2)]
        found = rows(tmp_path / "with", "attention", step=0)
        assert [row["component"] for row in found] == [*names, None]
        assert [row["heads"] for row in found] == [4, 4, 8]
        eager = self.model("eager")
        x = self.embedded()
        attentions = eager(inputs_embeds=x, output_attentions=True).attentions
        for row, p in zip(found, attentions, strict=False):
            p = p.detach().double()
            assert_entropy(row, -torch.special.xlogy(p, p).sum(-1))

    def embedded(self):
        torch.manual_seed(0)
        trained = Trained(self.model("sdpa"))
        torch.manual_seed(0)
        trained = Trained(nn.Identity())
        return trained.embed(next(iter(tokens()))[0]).detach()

    def test_the_eager_path_is_not_seen_and_said_how_to(self, tmp_path):
        with pytest.warns(UserWarning, match="attn_implementation"):
            train(self.model("eager"), tmp_path, [capture()], call=self.call, max_steps=1)


class TestMaps:
    def test_are_saved_as_arrays(self, tmp_path):
        part = Outer(dots=Dots(is_causal=True), wide=Dots(heads=2, key_heads=2))
        train(part, tmp_path, [capture(maps=3, every_n_steps=2)])
        assert sorted(p.name for p in (tmp_path / "attention").iterdir()) == [
            "step_000001.npz",
            "step_000003.npz",
        ]
        maps = np.load(tmp_path / "attention" / "step_000001.npz")
        assert {name: maps[name].shape for name in maps} == {
            "part.parts.dots": (3, TOKENS, TOKENS),
            "part.parts.wide": (2, TOKENS, TOKENS),
        }
        np.testing.assert_allclose(maps["part.parts.dots"].sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.triu(maps["part.parts.dots"], 1), 0, atol=1e-30)

    def test_long_ones_are_sampled_and_summed(self, tmp_path):
        def call(part, x):
            x = x.repeat(1, 50, 1).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x)

        train(nn.Identity(), tmp_path, [capture(maps=1)], call=call, max_steps=1)
        (array,) = np.load(tmp_path / "attention" / "step_000000.npz").values()
        assert array.shape == (1, 64, 256)
        np.testing.assert_allclose(array.sum(-1), 1, rtol=1e-5)

    def test_are_given_to_loggers_that_take_images(self, tmp_path):
        base = lightning("loggers.logger").DummyLogger

        class Board(base):
            def __init__(self):
                super().__init__()
                self.images = []
                add = lambda *args, **kwargs: self.images.append((args, kwargs))  # noqa: E731
                self._own = SimpleNamespace(add_image=add)

            @property
            def experiment(self):
                return self._own

        class Weights(Board):
            def log_image(self, key, images, step):
                self.images.append((key, images[0], step))

        class Broken(Board):
            def log_image(self, **_):
                raise OSError("gone")

        loggers = [Board(), Weights(), Broken(), RunLogger(tmp_path)]
        with pytest.warns(UserWarning, match="no more maps are given to Broken: OSError: gone"):
            train(Dots(), tmp_path, [capture(maps=2)], logger=loggers, max_steps=2)
        for (tag, image, step), options in loggers[0].images:
            assert tag == "attention/part/map"
            assert image.shape == (TOKENS, 2 * TOKENS + 1)
            assert image.dtype == np.uint8
            assert step in (0, 1)
            assert options == {"dataformats": "HW"}
        assert [entry[2] for entry in loggers[1].images] == [0, 1]

    def test_tensorboard_takes_them(self, tmp_path):
        pytest.importorskip("tensorboard")
        board = lightning("loggers").TensorBoardLogger(tmp_path)
        train(Dots(), tmp_path, [capture(maps=2)], logger=[board], max_steps=1)
        written = b"".join(p.read_bytes() for p in tmp_path.rglob("events.*"))
        assert b"attention/part/map" in written

    def test_a_full_disk_is_said_and_training_goes_on(self, tmp_path, monkeypatch):
        from lightning_diag.callbacks import attention_capture

        def fail(*_):
            raise OSError("no space left")

        monkeypatch.setattr(attention_capture, "save_maps", fail)
        with pytest.warns(UserWarning, match="maps of step 0 were not saved: no space left"):
            train(Dots(), tmp_path, [capture(maps=2)], max_steps=2)
        assert len(rows(tmp_path, "attention")) == 4


def test_goes_on_after_a_resume(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        return fit(
            Trained(Dots()),
            [capture(every_n_steps=2)],
            tokens(),
            tmp_path,
            enable_checkpointing=True,
            **options,
        )

    first = run(max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    run(max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    steps = [row["step"] for row in rows(tmp_path, "attention", component=None)]
    assert steps == [1, 3, 5, 7]


LONG = """
import resource, torch
from lightning_diag.functional.attention_capture import (
    attention_map, attention_sums, head_similarity
)
from lightning_diag.functional.attention_scores import dot_product_scores
q = torch.randn(1, 1, 16384, 16)
attention_sums(dot_product_scores(q[:, :, :64], q[:, :, :64]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = dot_product_scores(q, q, is_causal=True)
attention_sums(scores, max_rows=2048)
head_similarity(*attention_map(scores))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes are those of Linux")
def test_16384_tokens_need_no_square_map():
    # the map alone would be 1024 MB
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64
