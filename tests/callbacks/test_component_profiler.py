"""Is every number of ComponentProfiler's rows true, in every way in which Lightning can train?"""

import time
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_diag.callbacks.component_profiler import ComponentProfiler
from tests.callbacks.witness import Witness, fit, rows, scaler_plugin
from tests.conftest import Halving

NAP = 0.02


def every_step(**arguments):
    arguments = {"every_n_steps": 1, "on_error": "raise", "table": False, **arguments}
    return ComponentProfiler(**arguments)


def timed(path, **having):
    return [row for row in rows(path, "component", **having) if "counting" in row]


def by_component(path, step):
    return {row["component"]: row for row in timed(path, step=step)}


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class Sleeper(nn.Module):
    """A linear map that takes its time."""

    def __init__(self, forward=0.0, backward=0.0, inner=None):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.times = forward, backward
        self.called = (inner,)

    def forward(self, x):
        if self.called[0] is not None:
            x = self.called[0](x)
        return Slow.apply(self.linear(x), *self.times)


class Sleepers(Witness):
    """Two components; the head may call the encoder, or be called twice."""

    def __init__(self, encoder, head, steps="one after the other"):
        super().__init__()
        self.encoder, self.head, self.steps = encoder, head, steps
        del self.still, self.idle

    def loss(self, x):
        if self.steps == "twice":
            return (self.head(self.encoder(x)) + self.head(x)).square().mean()
        if self.steps == "side by side":
            return (self.head(x * self.encoder.linear.bias) + self.encoder(x)).square().mean()
        return self.head(x if self.steps == "nested" else self.encoder(x)).square().mean()


class TestSizes:
    def test_rows_of_the_start_say_what_the_model_is_made_of(self, loader, tmp_path):
        class Counted(Witness):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4)
                self.again = nn.Linear(4, 4, bias=False)
                self.again.weight = self.encoder[2].weight

        witness = Counted()
        fit(witness, every_step(every_n_steps=100), loader, tmp_path)
        found = {row.pop("component"): row for row in rows(tmp_path, "component")}
        for name in ("encoder", "head", "still", "idle", "norm"):
            part = getattr(witness, name)
            sizes = [p.numel() for p in part.parameters()]
            assert found[name]["parameters"] == sum(sizes)
            assert found[name]["frozen"] == (sum(sizes) if name == "still" else 0)
            assert found[name]["buffers"] == sum(b.numel() for b in part.buffers())
            state = part.state_dict().values()
            assert found[name]["bytes"] == sum(x.nbytes for x in state)
        whole = found[None]
        assert whole["parameters"] == sum(p.numel() for p in witness.parameters())
        assert whole["trainable"] + whole["frozen"] == whole["parameters"]
        assert whole["share"] == 1
        # tied, so counted in the encoder alone
        assert found["again"]["parameters"] == 0
        assert sum(row["share"] for name, row in found.items() if name) == pytest.approx(1)
        assert {row["step"] for row in found.values()} == {0}

    def test_the_share_is_of_the_whole_and_not_of_a_running_total(self, loader, tmp_path):
        fit(Halving(), every_step(every_n_steps=100), loader, tmp_path)
        shares = {row["component"]: row["share"] for row in rows(tmp_path, "component")}
        assert shares == {
            "encoder": pytest.approx(24 / 29),
            "head": pytest.approx(5 / 29),
            None: 1.0,
        }

    def test_patterns_make_the_parts(self, loader, tmp_path):
        fit(Witness(), every_step(components={"biases": "*bias"}), loader, tmp_path)
        start = [row for row in rows(tmp_path, "component") if "counting" not in row]
        assert [row["component"] for row in start] == ["biases", "other", None]
        assert start[0]["parameters"] == 4 + 4 + 1 + 2 + 3

    def test_thawed_parameters_show_at_the_next_measurement(self, loader, tmp_path):
        class Thaws(Witness):
            def on_train_batch_start(self, batch, batch_idx):
                self.still.requires_grad_(batch_idx >= 2)

        fit(Thaws(), every_step(), loader, tmp_path)
        frozen = [row["frozen"] for row in timed(tmp_path, component="still")]
        assert frozen[1] == 6
        assert frozen[3] == 0

    def test_scalars_reach_the_callback_metrics(self, loader, tmp_path):
        trainer = fit(Witness(), every_step(), loader, tmp_path)
        assert trainer.callback_metrics["component/head/parameters"] == 5
        assert trainer.callback_metrics["component/share"] == 1
        assert trainer.callback_metrics["component/encoder/forward_seconds"] > 0

    def test_a_model_without_parameters(self, loader, tmp_path):
        class Empty(Witness):
            def __init__(self):
                super().__init__()
                del self.encoder, self.head, self.still, self.idle

            def training_step(self, batch, batch_idx):
                return None

            def configure_optimizers(self):
                return None

        fit(Empty(), every_step(), loader, tmp_path)
        start = rows(tmp_path, "component")[0]
        assert start["component"] is None
        assert (start["parameters"], start["share"]) == (0, None)


class TestTable:
    def test_is_printed_at_the_start(self, loader, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        fit(Halving(), every_step(table=True), loader, tmp_path)
        said = capsys.readouterr().out
        lines = {line.split()[1]: set(line.split()) for line in said.splitlines() if "%" in line}
        assert {"24", "82.76%", "0", "96", "B"} <= lines["encoder"]
        assert {"29", "100.00%", "116"} <= lines["whole"]

    def test_is_not_where_it_is_not_wanted(self, loader, tmp_path, capsys):
        fit(Halving(), every_step(table=False), loader, tmp_path)
        assert "Components" not in capsys.readouterr().out

    def test_a_name_that_looks_like_markup_is_a_name(self, loader, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        parts = {"[red]one[/red]": "encoder.*", "[/nonsense]": "head.*"}
        fit(Halving(), every_step(components=parts, table=True), loader, tmp_path)
        said = capsys.readouterr().out
        assert "[red]one[/red]" in said
        assert "[/nonsense]" in said

    def test_a_closed_terminal_ends_nothing(self, loader, tmp_path, monkeypatch):
        def closed(rows):
            raise BrokenPipeError

        name = "lightning_diag.callbacks.component_profiler.print_table"
        monkeypatch.setattr(name, closed)
        fit(Witness(), every_step(table=True), loader, tmp_path)
        assert len(timed(tmp_path, component=None)) == 8


class TestTimes:
    def run(self, module, loader, path, **arguments):
        """Of several steps, the one with the least noise for each component."""
        fit(module, every_step(count_every=100), loader, path, limit_train_batches=4, **arguments)
        least = {}
        for row in timed(path, counting=0):
            for key in ("forward_seconds", "backward_seconds", "step_seconds"):
                if key in row:
                    place = row["component"], key
                    least[place] = min(least.get(place, row[key]), row[key])
        return least

    def test_forward_and_backward_of_each(self, loader, tmp_path):
        model = Sleepers(Sleeper(NAP, 2 * NAP), Sleeper(3 * NAP, 0))
        least = self.run(model, loader, tmp_path)
        assert least["encoder", "forward_seconds"] == pytest.approx(NAP, rel=0.3)
        assert least["encoder", "backward_seconds"] == pytest.approx(2 * NAP, rel=0.3)
        assert least["head", "forward_seconds"] == pytest.approx(3 * NAP, rel=0.3)
        assert least["head", "backward_seconds"] < NAP / 2
        assert least[None, "forward_seconds"] == pytest.approx(4 * NAP, rel=0.3)
        assert least[None, "backward_seconds"] == pytest.approx(2 * NAP, rel=0.3)
        assert least[None, "step_seconds"] == pytest.approx(6 * NAP, rel=0.3)

    def test_share_of_the_step(self, loader, tmp_path):
        fit(Sleepers(Sleeper(NAP, NAP), Sleeper(2 * NAP)), every_step(), loader, tmp_path)
        for row in timed(tmp_path):
            times = row.get("forward_seconds", 0) + row.get("backward_seconds", 0)
            step = by_component(tmp_path, row["step"])[None]["step_seconds"]
            assert row["step_share"] == pytest.approx(times / step)
            assert 0 < row["step_share"] < 1

    def test_several_calls_add_up(self, loader, tmp_path):
        model = Sleepers(Sleeper(), Sleeper(NAP, NAP), "twice")
        least = self.run(model, loader, tmp_path)
        assert least["head", "forward_seconds"] == pytest.approx(2 * NAP, rel=0.3)
        assert least["head", "backward_seconds"] == pytest.approx(2 * NAP, rel=0.3)
        assert timed(tmp_path, component="head")[0]["calls"] == 2
        assert least["encoder", "forward_seconds"] < NAP / 2

    def test_a_component_that_another_calls_is_timed_once(self, loader, tmp_path):
        encoder = Sleeper(NAP, NAP)
        model = Sleepers(encoder, Sleeper(2 * NAP, 2 * NAP, encoder), "nested")
        least = self.run(model, loader, tmp_path)
        for key in ("forward_seconds", "backward_seconds"):
            assert least["encoder", key] == pytest.approx(NAP, rel=0.3)
            assert least["head", key] == pytest.approx(2 * NAP, rel=0.3)

    def test_a_shared_input_lends_no_time_to_the_wrong_one(self, loader, tmp_path):
        """The head's input has its gradient long before the encoder is through, or after."""
        model = Sleepers(Sleeper(0, 3 * NAP), Sleeper(0, NAP), "side by side")
        least = self.run(model, loader, tmp_path)
        assert least["encoder", "backward_seconds"] == pytest.approx(3 * NAP, rel=0.3)
        assert least["head", "backward_seconds"] == pytest.approx(NAP, rel=0.3)

    def test_frozen_parts_pass_gradients_on_too(self, loader, tmp_path):
        head = Sleeper(0, NAP).requires_grad_(False)
        least = self.run(Sleepers(Sleeper(), head), loader, tmp_path)
        assert least["head", "backward_seconds"] == pytest.approx(NAP, rel=0.3)

    def test_a_part_that_needs_no_gradient_has_no_backward(self, loader, tmp_path):
        encoder = Sleeper(NAP).requires_grad_(False)
        least = self.run(Sleepers(encoder, Sleeper()), loader, tmp_path)
        assert ("encoder", "forward_seconds") in least
        assert ("encoder", "backward_seconds") not in least

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed_forward_runs_again_in_the_backward(self, reentrant, loader, tmp_path):
        class SleepsFirst(Sleeper):
            def forward(self, x):
                return self.linear(Slow.apply(x, *self.times))

        class Checkpointed(Sleepers):
            def loss(self, x):
                x = x.clone().requires_grad_()
                y = checkpoint(self.encoder, x, use_reentrant=reentrant)
                return self.head(y).square().mean()

        least = self.run(Checkpointed(SleepsFirst(NAP, NAP), Sleeper()), loader, tmp_path)
        assert least["encoder", "forward_seconds"] == pytest.approx(NAP, rel=0.3)
        assert least[None, "backward_seconds"] == pytest.approx(2 * NAP, rel=0.3)
        if not reentrant:
            assert least["encoder", "backward_seconds"] == pytest.approx(2 * NAP, rel=0.3)

    def test_manual_optimization_with_two_backward_passes(self, loader, tmp_path):
        class Manual(Sleepers):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                for _ in range(2):
                    loss = self.loss(batch[0])
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    optimizer.step()

        least = self.run(Manual(Sleeper(NAP, 2 * NAP), Sleeper()), loader, tmp_path)
        assert least["encoder", "forward_seconds"] == pytest.approx(2 * NAP, rel=0.3)
        assert least["encoder", "backward_seconds"] == pytest.approx(4 * NAP, rel=0.3)
        assert least[None, "forward_seconds"] == pytest.approx(2 * NAP, rel=0.4)
        assert least[None, "backward_seconds"] == pytest.approx(4 * NAP, rel=0.3)

    def test_a_retained_graph_counts_each_pass_and_not_the_time_between(self, loader, tmp_path):
        class Twice(Sleepers):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                loss = self.loss(batch[0])
                self.manual_backward(loss, retain_graph=True)
                time.sleep(3 * NAP)
                self.manual_backward(loss)
                self.optimizers().step()

        least = self.run(Twice(Sleeper(0, NAP), Sleeper()), loader, tmp_path)
        assert least["encoder", "backward_seconds"] == pytest.approx(2 * NAP, rel=0.3)


class Attention(Witness):
    attention = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.encoder = nn.Linear(3, 24)
        self.head = nn.Linear(8, 1)

    def loss(self, x):
        q, k, v = self.encoder(x)[None, None].chunk(3, -1)
        return self.head(self.attention(q, k, v, dropout_p=self.dropout)).square().mean()


class TestCounts:
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_operations_by_hand(self, dropout, loader, tmp_path):
        """With dropout the attention of a CPU is made of products, without it is one kernel."""
        fit(Attention(dropout), every_step(), loader, tmp_path)
        counted = by_component(tmp_path, 0).items()
        found = {name: row["forward_flops"] for name, row in counted if "forward_flops" in row}
        assert found["encoder"] == 2 * 4 * 3 * 24
        assert found["head"] == 2 * 4 * 8 * 1
        # the products of queries and keys, and of weights and values, belong to no component
        assert found[None] == found["encoder"] + found["head"] + 2 * (2 * 4 * 4 * 8)

    def test_operations_are_those_of_pytorchs_counter(self, loader, tmp_path):
        class Wide(Witness):
            def __init__(self):
                super().__init__()
                layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
                self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(0, (2, 2)), layer)
                self.head = nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(1, (1, 4)))
                self.head.append(nn.Conv1d(1, 2, 3))

            def loss(self, x):
                return self.head(self.encoder(x)).square().mean()

        wide = Wide()
        copy = deepcopy(wide)
        with FlopCounterMode(display=False) as counter:
            copy.loss(next(iter(loader))[0])
        fit(wide, every_step(), loader, tmp_path)
        found = by_component(tmp_path, 0)
        assert found[None]["forward_flops"] == counter.get_total_flops()
        assert found["head"]["forward_flops"] == 2 * 4 * 2 * 2 * 3
        parts = found["encoder"]["forward_flops"] + found["head"]["forward_flops"]
        assert parts == found[None]["forward_flops"]

    def test_every_n_th_measurement_counts_and_the_first(self, loader, tmp_path):
        fit(Witness(), every_step(count_every=3, every_n_steps=2), loader, tmp_path, max_epochs=2)
        whole = timed(tmp_path, component=None)
        assert [row["step"] for row in whole] == [1, 3, 5, 7, 9, 11, 13, 15]
        assert [row["counting"] for row in whole] == [1, 0, 0, 1, 0, 0, 1, 0]
        assert [("forward_flops" in row) for row in whole] == [row["counting"] for row in whole]

    def test_memory_that_is_kept_for_the_backward(self, loader, tmp_path):
        fit(Witness(), every_step(), loader, tmp_path)
        found = by_component(tmp_path, 0)
        # the result of tanh for itself and the next layer, and the result of that for the head
        assert found["encoder"]["saved_bytes"] == 2 * (4 * 4) * 4
        # of the difference from the target its square keeps (4, 1); the head's own result is gone
        assert found["head"]["saved_bytes"] == 0
        assert found["idle"].get("saved_bytes") is None
        # the difference, the loss itself, and Lightning's copy of it to be logged
        assert found[None]["saved_bytes"] == 2 * (4 * 4) * 4 + 4 * 4 + 4 + 4

    def test_memory_agrees_with_what_autograd_saves(self, loader, tmp_path):
        class Mixed(Witness):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Sequential(
                    nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 4)
                )

            def loss(self, x):
                return self.head(self.encoder(x)).square().mean()

        mixed = Mixed()
        kept = {}
        foreign = {p.untyped_storage().data_ptr() for p in mixed.parameters()}
        x = next(iter(loader))[0]
        foreign.add(x.untyped_storage().data_ptr())

        def pack(tensor):
            place = tensor.untyped_storage().data_ptr()
            if place not in foreign:
                kept[place] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            loss = mixed.loss(x)
        fit(mixed, every_step(), loader, tmp_path)
        whole = by_component(tmp_path, 0)[None]
        # the loss is there too, and Lightning's copy of it to be logged
        assert whole["saved_bytes"] == sum(kept.values()) + 2 * loss.nbytes

    def test_checkpointing_keeps_less(self, loader, tmp_path):
        class Checkpointed(Witness):
            def loss(self, x):
                y = checkpoint(self.encoder, x, use_reentrant=False)
                return self.head(y).square().mean()

        fit(Checkpointed(), every_step(), loader, tmp_path)
        assert by_component(tmp_path, 0)["encoder"]["saved_bytes"] == (4 * 4) * 4

    def test_manual_optimization_counts_its_components(self, loader, tmp_path):
        class Manual(Witness):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                loss = self.loss(batch[0])
                assert torch._C._len_torch_dispatch_stack() == 0
                self.manual_backward(loss)
                self.optimizers().step()

        fit(Manual(), every_step(), loader, tmp_path)
        found = by_component(tmp_path, 0)
        assert found["encoder"]["forward_flops"] == 2 * 4 * (3 * 4 + 4 * 4)
        assert found[None]["forward_flops"] == 2 * 4 * (3 * 4 + 4 * 4 + 4)
        assert found["encoder"]["saved_bytes"] == 2 * (4 * 4) * 4

    def test_peak_memory_is_unknown_on_a_cpu(self, loader, tmp_path):
        fit(Witness(), every_step(), loader, tmp_path)
        assert not any("peak_bytes" in row for row in rows(tmp_path, "component"))


class TestModes:
    def test_accumulation_measures_the_first_micro_batch_of_a_step(self, loader, tmp_path):
        seen = []

        class Watched(Witness):
            def training_step(self, batch, batch_idx):
                seen.append(bool(self.encoder._forward_hooks))
                return super().training_step(batch, batch_idx)

        arguments = {"accumulate_grad_batches": 2, "plugins": [scaler_plugin()]}
        fit(Watched(), every_step(every_n_steps=2), loader, tmp_path, **arguments)
        assert seen == [False, False, True, False, False, False, True, False]
        assert [row["step"] for row in timed(tmp_path, component=None)] == [1, 3]
        assert all(row["backward_seconds"] > 0 for row in timed(tmp_path, component="encoder"))

    def test_compiled_parts_are_timed_in_an_eager_copy(self, loader, tmp_path):
        witness = Witness()
        witness.encoder = torch.compile(witness.encoder, backend="aot_eager")
        fit(witness, every_step(), loader, tmp_path)
        for step in range(8):
            found = by_component(tmp_path, step)
            assert found["encoder"]["eager"] == 1
            assert found["encoder"]["forward_seconds"] > 0
            assert "backward_seconds" not in found["encoder"]
            assert "step_share" not in found["encoder"]
            assert found["head"]["eager"] == 0
            assert found["head"]["backward_seconds"] > 0
            assert found[None]["backward_seconds"] > 0
        first = by_component(tmp_path, 0)
        assert first["encoder"]["forward_flops"] == 2 * 4 * (3 * 4 + 4 * 4)
        assert "forward_flops" not in first["head"]
        assert "forward_flops" not in first[None]
        assert any("eager copy" in note["message"] for note in rows(tmp_path, "notes"))

    @pytest.mark.parametrize("inside", [True, False])
    def test_the_copys_time_is_not_the_models(self, inside, loader, tmp_path):
        class Naps(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 4)

            def forward(self, x):
                if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
                    time.sleep(NAP)
                return self.linear(x)

        witness = Witness()
        witness.encoder = torch.compile(Naps(), backend="eager")
        # the part that sleeps is the component, or is around it
        parts = {"part": "encoder" if inside else "encoder.linear.weight"}
        fit(witness, every_step(components=parts), loader, tmp_path)
        for row in timed(tmp_path, component="part") if inside else ():
            assert row["forward_seconds"] >= NAP
        later = [row["forward_seconds"] for row in timed(tmp_path, component=None)[1:]]
        assert min(later) < NAP / 2

    def test_a_forward_that_runs_again_in_a_manual_backward_is_no_second_call(
        self, loader, tmp_path
    ):
        class Manual(Sleepers):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                y = checkpoint(self.encoder, batch[0], use_reentrant=False)
                self.manual_backward(self.head(y).square().mean())
                self.optimizers().step()

        fit(Manual(Sleeper(NAP), Sleeper()), every_step(), loader, tmp_path)
        encoder = timed(tmp_path, component="encoder")
        assert [row["calls"] for row in encoder] == [1] * 8
        assert min(row["forward_seconds"] for row in encoder) < 1.8 * NAP

    def test_parts_that_are_not_called_are_named(self, loader, tmp_path):
        fit(Witness(), every_step(), loader, tmp_path)
        told = [note["message"] for note in rows(tmp_path, "notes") if "called" in note["message"]]
        assert len(told) == 1
        assert "`still`, `idle`" in told[0]
        assert all(row["calls"] == 0 for row in timed(tmp_path, component="idle"))

    def test_a_step_without_loss(self, loader, tmp_path):
        class Nothing(Witness):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) if batch_idx != 1 else None

        fit(Nothing(), every_step(), loader, tmp_path)
        whole = timed(tmp_path, component=None)
        assert len(whole) == 8
        assert "backward_seconds" not in whole[1]
        assert whole[2]["backward_seconds"] > 0

    def test_results_in_containers(self, loader, tmp_path):
        class Boxes(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 3)

            def forward(self, x):
                return {"found": [Slow.apply(self.linear(x), 0, NAP)], "other": None}

        class Boxed(Sleepers):
            def loss(self, x):
                return self.head(self.encoder(x)["found"][0]).square().mean()

        fit(Boxed(Boxes(), Sleeper()), every_step(), DataLoader(loader.dataset, 4), tmp_path)
        assert min(r["backward_seconds"] for r in timed(tmp_path, component="encoder")) >= NAP
