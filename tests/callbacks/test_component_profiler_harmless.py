"""Is ComponentProfiler harmless, and what do modules say of themselves through it?"""

import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_diag import RunLogger
from lightning_diag.callbacks.component_profiler import ComponentProfiler
from lightning_diag.callbacks.profile_graph import borders, graph_position
from lightning_diag.callbacks.profile_operators import OperatorCount
from lightning_diag.functional.batches import tensors_in
from tests.callbacks.witness import Witness, fit, lightning, rows
from tests.promises.reads import WatchSteps, census
from tests.promises.trace import differences, train


def every_step(**arguments):
    arguments = {"every_n_steps": 1, "on_error": "raise", "table": False, **arguments}
    return ComponentProfiler(**arguments)


def timed(path, **having):
    return [row for row in rows(path, "component", **having) if "counting" in row]


# every mode is among the promises; here are those in which each forward is counted
MODES_HERE = ["plain", "accumulated", "bf16", "tied", "manual", "aot_eager"]


class TestInvisible:
    @pytest.mark.parametrize("mode", MODES_HERE)
    def test_bits_and_graphs_are_the_same(self, mode, tmp_path):
        traces = []
        for name in ("without", "with"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            profiler = every_step(every_n_steps=2, count_every=1)
            given = [profiler] if name == "with" else []
            trace, _ = train(mode, tmp_path / name, given, logger=RunLogger(tmp_path / name))
            graphs = dict(torch._dynamo.utils.counters["stats"])
            traces.append({**trace, "graphs": graphs})
        assert not differences(*traces)
        assert len(timed(tmp_path / "with", component=None)) >= 2

    def test_a_frozen_backbone_keeps_its_fused_kernels(self, loader, tmp_path):
        """Hooks inside would turn them off, and with them the last bits of the result."""

        class Frozen(Witness):
            def __init__(self):
                super().__init__()
                torch.manual_seed(1)
                layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
                self.still = nn.Sequential(nn.Linear(3, 8), layer).requires_grad_(False)
                self.encoder = nn.Linear(8, 4)

            def loss(self, x):
                self.still.eval()
                with torch.no_grad():
                    x = self.still(x[None])[0]
                return self.head(self.encoder(x)).square().mean()

        weights = []
        for callbacks in ([], [every_step(count_every=2)]):
            module = Frozen()
            fit(module, callbacks, loader, tmp_path)
            weights.append([p.detach() for p in module.parameters()])
        assert all(one.equal(two) for one, two in zip(*weights, strict=True))

    def test_a_function_that_the_user_compiles_stays_compiled(self, loader, tmp_path):
        calls = []

        def backend(graph, examples):
            def run(*inputs):
                calls.append(len(inputs))
                return graph.forward(*inputs)

            return run

        @torch.compile(backend=backend)
        def squared(x):
            return (x * x).mean()

        class Compiles(Witness):
            def loss(self, x):
                return squared(self.head(self.encoder(x)))

        torch._dynamo.reset()
        fit(Compiles(), every_step(count_every=2), loader, tmp_path)
        assert len(calls) == 8

    @pytest.mark.parametrize("work", ["vmap", "grad", "autograd"])
    def test_other_ways_to_differentiate_go_on(self, work, loader, tmp_path):
        class Transforms(Witness):
            def loss(self, x):
                y = self.encoder(x)
                if work == "vmap":
                    y = torch.func.vmap(lambda row: row * row.sum())(y)
                elif work == "grad":
                    y = y * torch.func.grad(lambda z: (z**3).sum())(y)
                else:
                    y = y + torch.autograd.grad(y.square().sum(), y, create_graph=True)[0]
                return self.head(y).square().mean()

        fit(Transforms(), every_step(), loader, tmp_path)
        assert len(timed(tmp_path, component="encoder")) == 8

    @pytest.mark.parametrize("mode", ["plain", "two_optimizers"])
    def test_hooks_live_on_measured_steps_alone(self, mode, tmp_path):
        def watched(*callbacks):
            watch = WatchSteps()
            train(mode, tmp_path, [watch, *callbacks], logger=RunLogger(tmp_path / "run"))
            return watch

        without, watch = watched(), watched(every_step(every_n_steps=3))
        steps = watch.steps
        for number, (step, before) in enumerate(zip(steps, without.steps, strict=True)):
            due = number % 3 == 2
            assert bool(step.own_operations) == due
            # what `training_step` itself reads comes from elsewhere
            own = (step.reads - before.reads).items()
            assert sum(n for read, n in own if "profile" in read) == due
            assert step.hooks == before.hooks

    def test_activations_do_not_outlive_their_step(self, loader, tmp_path):
        kept = []

        class Keeps(Witness):
            def loss(self, x):
                y = self.encoder(x)
                kept.append(weakref.ref(y.untyped_storage()))
                return self.head(y).square().mean()

            def on_train_batch_start(self, batch, batch_idx):
                assert not [one for one in kept if one() is not None]

        gc.disable()
        try:
            fit(Keeps(), every_step(), loader, tmp_path)
        finally:
            gc.enable()
        assert len(kept) == 8

    @pytest.mark.parametrize("where", ["encoder", "step", "backward", "caught"])
    @pytest.mark.parametrize("automatic", [True, False])
    def test_nothing_is_left_after_an_exception(self, where, automatic, loader, tmp_path):
        class Falls(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 4)

            def forward(self, x):
                if where in ("encoder", "caught"):
                    raise ZeroDivisionError
                return self.linear(x)

        class Falling(Witness):
            automatic_optimization = automatic

            def __init__(self):
                super().__init__()
                self.encoder = Falls()

            def training_step(self, batch, batch_idx):
                try:
                    y = self.encoder(batch[0])
                except ZeroDivisionError:
                    if where != "caught":
                        raise
                    y = self.encoder.linear(batch[0])
                if where == "step":
                    raise ZeroDivisionError
                loss = self.head(y).square().mean()
                if where == "backward":
                    loss.register_hook(lambda gradient: 1 / 0)
                if not automatic:
                    self.manual_backward(loss)
                    self.optimizers().step()
                return loss

        module = Falling()
        before = census(module)
        if where == "caught":
            fit(module, every_step(), loader, tmp_path)
            first = timed(tmp_path, component="encoder")[0]
            assert first["calls"] == 1
            # what comes after a call that failed is not its own
            assert first["forward_flops"] == 0
        else:
            with pytest.raises(ZeroDivisionError):
                fit(module, every_step(), loader, tmp_path)
        assert census(module) == before

    @pytest.mark.parametrize("place", ["_before", "_after", "_watch_backward", "costs", "_hang"])
    @pytest.mark.parametrize("automatic", [True, False])
    def test_a_failure_ends_the_profiler_alone(
        self, place, automatic, loader, tmp_path, monkeypatch
    ):
        from lightning_diag.callbacks.profile_measurement import Measurement

        class Either(Witness):
            automatic_optimization = automatic

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                if not automatic:
                    self.manual_backward(loss)
                    self.optimizers().step()
                return loss

        def broken(*args, **kwargs):
            raise LookupError("planted")

        monkeypatch.setattr(Measurement, place, broken)
        module, other = Either(), Either()
        before = census(module)
        with pytest.warns(RuntimeWarning, match="ComponentProfiler has ended .*planted"):
            fit(module, every_step(on_error="warn"), loader, tmp_path / "with")
        fit(other, [], loader, tmp_path / "without")
        assert census(module) == before
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            assert one.equal(two)
        with pytest.raises(LookupError, match="planted"):
            fit(Either(), every_step(), loader, tmp_path / "raises")

    def test_a_formula_that_fails_costs_only_its_number(self, loader, tmp_path, monkeypatch):
        from lightning_diag.callbacks import profile_operators

        def broken(*args, **kwargs):
            raise AssertionError

        formulas = {**profile_operators.flop_registry, torch.ops.aten.addmm: broken}
        monkeypatch.setattr(profile_operators, "flop_registry", formulas)
        fit(Witness(), every_step(), loader, tmp_path)
        assert timed(tmp_path, component="encoder")[0]["forward_flops"] == 0
        assert any("`addmm`" in note["message"] for note in rows(tmp_path, "notes"))


class TestState:
    def test_counting_goes_on_where_it_was(self, loader, tmp_path):
        save = lightning("callbacks").ModelCheckpoint(
            tmp_path, every_n_train_steps=4, save_last=True
        )
        options = {"enable_checkpointing": True}
        fit(Witness(), [every_step(count_every=3), save], loader, tmp_path, max_steps=4, **options)
        fit(
            *(Witness(), every_step(count_every=3), loader, tmp_path),
            ckpt_path=str(tmp_path / "last.ckpt"),
        )
        whole = timed(tmp_path, component=None)
        assert [row["step"] for row in whole] == list(range(8))
        assert [row["counting"] for row in whole] == [1, 0, 0, 1, 0, 0, 1, 0]

    def test_auto_measures(self, loader, tmp_path):
        profiler = every_step(every_n_steps="auto", overhead_budget=1.0)
        fit(Witness(), profiler, loader, tmp_path, max_epochs=3)
        assert timed(tmp_path, component=None)

    def test_a_second_fit_begins_anew(self, loader, tmp_path):
        profiler = every_step(count_every=100)
        for name in "ab":
            fit(Witness(), profiler, loader, tmp_path / name)
            counting = [row["counting"] for row in timed(tmp_path / name, component=None)]
            assert counting == [1, *[0] * 7]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"count_every": 0}, "`count_every` must be at least 1, got 0."),
            ({"every_n_steps": 0}, '`every_n_steps` must be at least 1 or "auto", got 0.'),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
            ComponentProfiler(**arguments)
        assert str(caught.value) == message


class Gate(nn.Module):
    """Says something of itself."""

    def __init__(self, says=None):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.says = says
        self.asked = 0

    def forward(self, x):
        self.gates = self.linear(x).sigmoid()
        return self.gates

    def diagnostics(self):
        self.asked += 1
        torch.rand(3)
        return self.says(self) if self.says else {"gate": self.gates}


class Gated(Witness):
    def __init__(self, says=None):
        super().__init__()
        self.encoder = nn.Sequential(Gate(says))


class TestInternals:
    def said(self, path):
        return rows(path, "component_internal")

    def test_tensors_become_mean_min_max(self, loader, tmp_path):
        seen = []

        class Sees(Gated):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                seen.append(self.encoder[0].gates.detach().double())

        module = Sees()
        fit(module, every_step(every_n_steps=3), loader, tmp_path)
        found = self.said(tmp_path)
        assert [row["step"] for row in found] == [2, 5]
        assert module.encoder[0].asked == 2
        for row in found:
            gates = seen[row["step"]]
            assert (row["component"], row["module"]) == ("encoder", "encoder.0")
            assert row["name"] == "gate"
            assert row["value"] == pytest.approx(gates.mean().item(), rel=1e-9)
            assert row["min"] == pytest.approx(gates.min().item(), rel=1e-9)
            assert row["max"] == pytest.approx(gates.max().item(), rel=1e-9)

    def test_only_the_class_says_that_a_module_reports(self, loader, tmp_path):
        class Odd(nn.Linear):
            @property
            def diagnostics(self):
                raise RuntimeError("not ready")

        class Any(nn.Tanh):
            def __getattr__(self, name):
                if name == "diagnostics":
                    return lambda: {"never": 1.0}
                return super().__getattr__(name)

        module = Gated()
        module.encoder.append(Odd(4, 4))
        module.encoder.append(Any())
        fit(module, every_step(), loader, tmp_path, limit_train_batches=1)
        assert {row["name"] for row in self.said(tmp_path)} == {"gate"}

    def test_numbers_scalars_and_nested_mappings(self, loader, tmp_path):
        def says(gate):
            return {
                "float": 1.5,
                "flag": True,
                "one": torch.tensor([3], dtype=torch.int64),
                "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
                "mask": torch.tensor([True, False]),
                "deep": {"er": {"value": torch.tensor(2.0)}},
                "nan": torch.tensor(torch.nan),
            }

        fit(Gated(says), every_step(), loader, tmp_path, limit_train_batches=1)
        found = {row["name"]: row for row in self.said(tmp_path)}
        values = {name: row["value"] for name, row in found.items()}
        assert values == {
            "float": 1.5,
            "flag": 1,
            "one": 3,
            "half": 1.5,
            "mask": 0.5,
            "deep.er.value": 2,
            "nan": None,
        }
        assert (found["half"]["min"], found["half"]["max"]) == (1, 2)
        assert found["nan"]["value_nonfinite"] == 1
        assert "min" not in found["one"]

    def test_the_whole_model_may_speak_too(self, loader, tmp_path):
        class Speaks(Witness):
            def diagnostics(self):
                return {"temperature": 2}

        fit(Speaks(), every_step(), loader, tmp_path)
        assert {(row["component"], row["module"]) for row in self.said(tmp_path)} == {(None, "")}

    def test_one_that_fails_is_left_out_and_the_others_are_not(self, loader, tmp_path):
        def fails(gate):
            raise LookupError("not today")

        module = Gated(fails)
        module.head = nn.Sequential(Gate(), nn.Linear(4, 1))
        module.head[0].linear = nn.Linear(4, 4)
        module.head.weight = module.head[1].weight
        with pytest.warns(UserWarning, match="`encoder.0` is left out: LookupError: not today"):
            fit(module, every_step(on_error="warn"), loader, tmp_path)
        assert module.encoder[0].asked == 1
        assert {row["module"] for row in self.said(tmp_path)} == {"head.0"}
        assert len(timed(tmp_path, component=None)) == 8
        with pytest.raises(LookupError, match="not today"):
            fit(Gated(fails), every_step(), loader, tmp_path)

    def test_what_is_no_mapping_is_refused(self, loader, tmp_path):
        with pytest.raises(TypeError) as caught:
            fit(Gated(lambda gate: [1]), every_step(), loader, tmp_path)
        message = "`diagnostics()` of `encoder.0` must return a mapping, got list."
        assert str(caught.value) == message

    def test_none_is_nothing_and_odd_values_are_named(self, loader, tmp_path):
        fit(Gated(lambda gate: None), every_step(), loader, tmp_path / "none")
        assert not self.said(tmp_path / "none")
        odd = {"word": "yes", "empty": torch.zeros(0), "complex": torch.zeros(1) * 1j}
        fit(Gated(lambda gate: odd), every_step(), loader, tmp_path / "odd")
        assert not self.said(tmp_path / "odd")
        told = [note for note in rows(tmp_path / "odd", "notes") if "`word`" in note["message"]]
        assert len(told) == 1
        assert "`empty` of `encoder.0`, `complex` of `encoder.0`" in told[0]["message"]

    def test_random_numbers_and_gradients_are_as_without(self, loader, tmp_path):
        states = []
        for given in ([], [every_step()]):
            torch.manual_seed(3)
            module = Gated()
            fit(module, given, loader, tmp_path)
            states.append([torch.get_rng_state(), *module.parameters()])
        assert all(one.equal(two) for one, two in zip(*states, strict=True))

    def test_speaking_costs_no_second_read(self, tmp_path, loader):
        watch = WatchSteps()
        fit(Gated(), [watch, every_step(every_n_steps=2)], loader, tmp_path)
        for number, step in enumerate(watch.steps):
            own = [read for read in step.own_reads if "component_profiler" in read]
            assert len(own) == number % 2
            assert not [read for read in step.own_reads if "profile_" in read]

    def test_inside_a_compiled_part(self, loader, tmp_path):
        module = Gated()
        module.encoder = torch.compile(module.encoder, backend="eager")
        fit(module, every_step(), loader, tmp_path)
        assert {row["module"] for row in self.said(tmp_path)} == {"encoder.0"}


class TestPieces:
    def test_borders_of_a_call(self):
        x = torch.ones(3, requires_grad=True) * 2
        since = graph_position()
        hidden = x.exp()
        y = hidden * hidden + x
        first, last = borders([y], since)
        after = y * 3
        assert first == [y.grad_fn]
        # the sum passes gradients to `x`, and so does the exponential
        assert {node.name() for node in last} == {"AddBackward0", "ExpBackward0"}
        assert borders([after], graph_position()) == ([], [])
        assert borders([x, torch.ones(2)], since) == ([], [])

    def test_borders_of_a_deep_graph_need_no_recursion(self):
        x = torch.ones(3, requires_grad=True)
        since = graph_position()
        y = x
        for _ in range(3000):
            y = y + 1
        first, last = borders([y], since)
        assert len(first) == len(last) == 1

    def test_tensors_in_containers(self):
        a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
        assert [x.numel() for x in tensors_in({"a": [a, (b,)], "b": None, "c": c, "d": 3})] == [
            1,
            2,
            3,
        ]

    def test_views_and_changes_in_place_make_no_memory(self):
        x = torch.ones(8, 4)
        weight = nn.Parameter(torch.ones(4, 4))
        count = OperatorCount(lambda: ("mine", 0), lambda function: function)
        with count:
            kept = [x.view(4, 8), weight.t(), (x @ weight).relu_().t()]
            torch.zeros(1000)
        assert count.held() == {"mine": 8 * 4 * 4}
        del kept
        assert count.held() == {}
        assert count.flops == {"mine": 2 * 8 * 4 * 4}

    def test_operators_give_what_they_give(self):
        x, w = torch.randn(5, 3), torch.randn(3, 3, requires_grad=True)
        with OperatorCount(lambda: (0, 0), lambda function: function):
            y = torch.linalg.solve(w, x.T).softmax(0)
        assert y.equal(torch.linalg.solve(w, x.T).softmax(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestDevice:
    def test_times_and_memory_of_a_device(self, loader, tmp_path):
        class Wide(Witness):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Sequential(nn.Linear(3, 4096), nn.Tanh(), nn.Linear(4096, 4))

            def loss(self, x):
                return self.head(self.encoder(x.repeat(512, 1))).square().mean()

        fit(Wide(), every_step(count_every=2), loader, tmp_path, accelerator="gpu")
        for row in timed(tmp_path, component="encoder"):
            assert row["forward_seconds"] > 0
            assert row["backward_seconds"] > 0
            if row["counting"]:
                assert row["peak_bytes"] >= row["saved_bytes"] >= 512 * 4 * 4096 * 4
