"""Does ActivationHealth see every activation function once, and only the dead as dead?"""

import contextlib
import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_diag.callbacks.activation_health import ActivationHealth
from lightning_diag.callbacks.activation_health_forward import activation_calls
from lightning_diag.callbacks.forward import Scope
from lightning_diag.lightning import Callback, LightningModule
from tests.callbacks.witness import Witness, fit, lightning, rows, scaler_plugin
from tests.promises.reads import census


def every_step(**arguments: object) -> ActivationHealth:
    return ActivationHealth(**({"every_n_steps": 1, "on_error": "raise", "window": 2} | arguments))


class Net(LightningModule):
    """Whatever `body` is, between a first and a last layer."""

    def __init__(self, body: nn.Module, width: int = 6, out: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.first = nn.Linear(3, width)
            self.last = nn.Linear(out, 1)
        self.body = body

    def forward(self, x):
        return self.last(self.body(self.first(x)))

    def training_step(self, batch, batch_idx):
        return self(batch[0].to(self.first.weight.dtype)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Functions(nn.Module):
    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def forward(self, x):
        for function in self.functions:
            x = function(x)
        return x


def seen(path, step=0):
    return {row["component"]: row for row in rows(path, "activation", step=step)}


class TestWhatIsSeen:
    @pytest.mark.parametrize(
        ("module", "function"),
        [
            (nn.ReLU(), "relu"),
            (nn.ReLU(inplace=True), "relu"),
            (nn.ReLU6(), "relu6"),
            (nn.LeakyReLU(), "leaky_relu"),
            (nn.PReLU(), "prelu"),
            (nn.GELU(approximate="tanh"), "gelu"),
            (nn.SiLU(inplace=True), "silu"),
            (nn.Mish(), "mish"),
            (nn.ELU(), "elu"),
            (nn.SELU(), "selu"),
            (nn.CELU(), "celu"),
            (nn.Softplus(), "softplus"),
            (nn.Tanh(), "tanh"),
            (nn.Sigmoid(), "sigmoid"),
            (nn.Hardtanh(), "hardtanh"),
            (nn.Hardtanh(0.0, 2.0), "relu6"),
            (nn.Hardswish(), "hardswish"),
            (nn.Hardsigmoid(), "hardsigmoid"),
            (nn.RReLU(), "rrelu"),
        ],
        ids=str,
    )
    def test_modules_once(self, loader, tmp_path, module, function):
        fit(Net(module), every_step(), loader, tmp_path)
        found = seen(tmp_path)
        assert set(found) == {"body", None}
        assert found["body"]["function"] == function
        assert found["body"]["calls"] == 1
        assert found["body"]["units"] == 6
        assert found["body"]["count"] == 24

    @pytest.mark.parametrize(
        ("call", "function"),
        [
            (F.relu, "relu"),
            (torch.relu, "relu"),
            (torch.relu_, "relu"),
            (lambda x: x.relu(), "relu"),
            (lambda x: x.relu_(), "relu"),
            (lambda x: F.relu(x, inplace=True), "relu"),
            (F.gelu, "gelu"),
            (F.silu, "silu"),
            (torch.tanh, "tanh"),
            (lambda x: x.tanh(), "tanh"),
            (F.tanh, "tanh"),
            (torch.sigmoid, "sigmoid"),
            (lambda x: x.sigmoid(), "sigmoid"),
            (F.leaky_relu, "leaky_relu"),
            (lambda x: F.hardtanh(x, -2, 2), "hardtanh"),
            (lambda x: F.hardtanh(x, min_val=0.0, max_val=3.0), "relu6"),
            (F.elu, "elu"),
            (F.softplus, "softplus"),
        ],
    )
    def test_functions_once_in_the_module_that_calls(self, loader, tmp_path, call, function):
        # a copy first: in place on the output of a layer is fine, on a leaf it is not
        fit(Net(Functions(torch.clone, call)), every_step(), loader, tmp_path)
        found = seen(tmp_path)
        assert set(found) == {"body", None}
        assert found["body"]["function"] == function

    def test_a_module_that_is_used_several_times(self, loader, tmp_path):
        act = nn.ReLU()
        body = nn.Sequential(act, nn.Linear(6, 6), act, *[act] * 4)
        fit(Net(body), every_step(), loader, tmp_path)
        found = seen(tmp_path)
        assert set(found) == {"body.0", "body.0#2", "body.0#3", "body.0#4", None}
        assert found["body.0#4"]["calls"] == 3
        assert found["body.0#4"]["count"] == 3 * 24

    def test_a_function_of_the_training_step_itself(self, loader, tmp_path):
        class Step(Net):
            def training_step(self, batch, batch_idx):
                return self.last(F.relu(self.first(batch[0]))).mean()

        fit(Step(nn.Identity()), every_step(), loader, tmp_path)
        assert set(seen(tmp_path)) == {"training_step", None}

    def test_a_gelu_that_somebody_wrote_by_hand(self, loader, tmp_path):
        class NewGELUActivation(nn.Module):
            def forward(self, x):
                inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))
                return 0.5 * x * (1 + torch.tanh(inner))

        fit(Net(NewGELUActivation()), every_step(), loader, tmp_path)
        found = seen(tmp_path)
        assert set(found) == {"body", None}
        assert found["body"]["function"] == "gelu"
        assert found["body"]["saturated_share"] is None

    def test_only_the_chosen(self, loader, tmp_path):
        body = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sequential(nn.ReLU()))
        fit(Net(body), every_step(modules=["body.0", "body.2"]), loader, tmp_path)
        assert set(seen(tmp_path)) == {"body.0", "body.2.0", None}

    def test_the_part_that_a_module_belongs_to(self, loader, tmp_path):
        body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        diagnostic = every_step(components={"middle": "body.*"})
        fit(Net(body), diagnostic, loader, tmp_path)
        assert seen(tmp_path)["body.1"]["part"] in ("middle", None)
        fit(Net(body), every_step(), loader, tmp_path / "other")
        assert seen(tmp_path / "other")["body.1"]["part"] == "body"

    def test_nothing_there_is_said(self, loader, tmp_path):
        with pytest.warns(UserWarning, match="no activation function was seen"):
            fit(Net(nn.Identity()), every_step(), loader, tmp_path)
        assert not rows(tmp_path, "activation")
        said = [row["message"] for row in rows(tmp_path, "notes", severity="warning")]
        assert sum("was seen" in message for message in said) == 1

    def test_a_glob_that_matches_nothing_is_said(self, loader, tmp_path):
        with pytest.warns(UserWarning, match="`bodi` match no module"):
            fit(Net(nn.ReLU()), every_step(modules="bodi"), loader, tmp_path)


class Channels(nn.Module):
    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.mix = nn.Linear(4, 4)
        with torch.no_grad():
            # everything is positive, but for what is planted
            self.conv.weight.fill_(0.01)
            self.conv.bias.fill_(5)
            self.mix.weight.fill_(0.1)
        self.last = last

    def forward(self, x):
        x = self.conv(x.view(-1, 1, 2, 3))
        if self.last:
            x = self.mix(x.movedim(1, -1))
        else:
            self.mix(x.movedim(1, -1))
            x = self.conv(x[:, :1])
        x = x.clone()
        x[..., 1] = -1
        x = F.relu(x)
        return x.movedim(-1, 1).flatten(1) if self.last else x.flatten(1)


class TestUnits:
    @pytest.mark.parametrize("last", [True, False])
    def test_the_layer_before_tells_where_the_units_are(self, loader, tmp_path, last):
        fit(Net(Channels(last=last), out=24), every_step(), loader, tmp_path)
        (row,) = rows(tmp_path, "activation", step=0, component="body")
        assert row["units"] == 4
        # the last place is silent: a feature behind the linear layer, an image column elsewhere
        assert row["dead_now"] == (0.25 if last else 0)

    def test_sequences(self, loader, tmp_path):
        class Sequence(nn.Module):
            def forward(self, x):
                return F.relu(x.view(-1, 2, 3)).flatten(1)

        fit(Net(Sequence()), every_step(), loader, tmp_path)
        assert seen(tmp_path)["body"]["units"] == 3


class Planted(nn.Module):
    """Adds a constant to some units before the activation."""

    def __init__(self, act: nn.Module, shift: list[float]) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("shift", torch.tensor(shift))

    def forward(self, x):
        return self.act(x + self.shift.to(x.dtype))


class TestNumbers:
    @pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
    def test_what_numpy_says(self, loader, tmp_path, precision):
        kept = []

        class Keeps(nn.Module):
            def forward(self, x):
                y = F.relu(x)
                kept.append(y.detach().double())
                return y

        fit(Net(Keeps()), every_step(), loader, tmp_path, precision=precision)
        for step, y in enumerate(kept):
            row = seen(tmp_path, step)["body"]
            assert row["mean"] == pytest.approx(y.mean().item(), rel=1e-5)
            assert row["std"] == pytest.approx(y.std(correction=0).item(), rel=1e-5)
            assert row["rms"] == pytest.approx(y.square().mean().sqrt().item(), rel=1e-5)
            assert (row["min"], row["max"]) == (y.min(), pytest.approx(y.max().item()))
            assert row["zero_share"] == pytest.approx((y == 0).double().mean().item())
            assert row["dead_now"] == pytest.approx((y == 0).all(0).double().mean().item())

    def test_a_healthy_relu_at_half_zeros_is_healthy(self, loader, tmp_path):
        net = Net(nn.ReLU(), width=400, out=400)
        with torch.no_grad():
            net.first.bias.zero_()
        fit(net, every_step(), loader, tmp_path)
        row = seen(tmp_path, 7)["body"]
        assert row["zero_share"] == pytest.approx(0.5, abs=0.1)
        assert row["dead_share"] < 0.02

    def test_dead_units_are_found_when_the_window_is_full(self, loader, tmp_path):
        body = Planted(nn.ReLU(), [0, 0, -100, 0, -100, 0.0])
        fit(Net(body), every_step(window=3), loader, tmp_path)
        found = rows(tmp_path, "activation", component="body.act")
        assert [row["dead_share"] is None for row in found] == [True, True] + [False] * 6
        assert all(row["dead_units"] >= 2 for row in found[2:])
        assert all(row["dead_now"] >= 2 / 6 for row in found)
        whole = rows(tmp_path, "activation", component=None)[-1]
        assert whole["most_dead"] == "body.act"
        assert whole["dead_units"] == found[-1]["dead_units"]
        assert whole["modules"] == 1

    def test_one_silent_batch_is_no_death(self, loader, tmp_path):
        class Silent(Planted):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return self.act(x + (-100 if self.calls == 3 else 100))

        fit(Net(Silent(nn.ReLU(), [0.0] * 6)), every_step(), loader, tmp_path)
        found = rows(tmp_path, "activation", component="body.act")
        assert [row["dead_now"] for row in found] == [0, 0, 1, 0, 0, 0, 0, 0]
        assert [row["dead_share"] for row in found] == [None, 0, 0, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize(("act", "depth"), [(nn.GELU(), -3.5), (nn.SiLU(), -7.0)])
    def test_a_smooth_unit_in_its_tail_is_dead(self, loader, tmp_path, act, depth):
        net = Net(Planted(act, [0, depth, 0, 0, 0, 0.0]))
        with torch.no_grad():
            net.first.weight.mul_(0.01)
            net.first.bias.zero_()
        fit(net, every_step(), loader, tmp_path)
        row = seen(tmp_path, 7)["body.act"]
        # the others are tiny too, but around zero, where there is slope
        assert row["dead_units"] == 1
        assert row["zero_share"] == pytest.approx(1 / 6)

    @pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid(), nn.Hardtanh()], ids=str)
    def test_saturated(self, loader, tmp_path, act):
        net = Net(Planted(act, [50, -50, 0, 0, 0, 0.0]))
        with torch.no_grad():
            net.first.weight.mul_(0.01)
            net.first.bias.zero_()
        fit(net, every_step(), loader, tmp_path)
        row = seen(tmp_path, 7)["body.act"]
        assert row["saturated_units"] == pytest.approx(2 / 6)
        assert row["saturated_share"] == pytest.approx(2 / 6)
        assert row["dead_share"] is None
        assert row["zero_share"] is None
        assert seen(tmp_path, 7)[None]["most_saturated"] == "body.act"

    def test_not_finite(self, loader, tmp_path):
        fit(Net(Planted(nn.ReLU(), [math.nan, 0, 0, 0, 0, 0.0])), every_step(), loader, tmp_path)
        row = seen(tmp_path)["body.act"]
        assert row["nonfinite"] == 4
        assert row["mean"] is None
        assert row["dead_now"] < 1


class Mapped(nn.Module):
    """Runs its part on each sample by itself, in one go, and once more as usual."""

    def __init__(self, part, plain=True):
        super().__init__()
        self.part = part
        self.plain = plain

    def forward(self, x):
        y = torch.func.vmap(self.part, randomness="different")(x)
        return y + self.part(x) if self.plain else y


class TestModes:
    @pytest.mark.parametrize("function", [nn.Tanh(), torch.tanh])
    def test_a_transform_is_passed_by(self, loader, tmp_path, function):
        ends = []
        for callbacks in ([], [every_step()]):
            part = function if isinstance(function, nn.Module) else Functions(function)
            module = Net(Mapped(part))
            fit(module, callbacks, loader, tmp_path)
            ends.append(list(module.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        assert seen(tmp_path)["body.part"]["calls"] == 1
        said = [row for row in rows(tmp_path, "notes") if "torch.func" in row["message"]]
        assert [row["severity"] for row in said] == ["info"]

    def test_dynamo_traces_nothing_of_the_mode(self, monkeypatch):
        seen = []
        calls = activation_calls(
            Scope({}, shadow=False, compiled=False),
            lambda *found: seen.append(found[:2]),
            0.97,
            guard=lambda function: function,
            timed=contextlib.nullcontext,
            passed_by=lambda: None,
        )
        with calls:
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            F.relu(torch.ones(3))
            assert not seen
            monkeypatch.undo()
            F.relu(torch.ones(3))
        assert seen == [("training_step", "relu")]

    def test_compiled_functions_are_left_alone(self, loader, tmp_path):
        torch._dynamo.reset()
        relu = torch.compile(F.relu, backend="aot_eager", fullgraph=True)
        fit(Net(Functions(relu, torch.tanh)), every_step(), loader, tmp_path)
        assert seen(tmp_path)["body"]["function"] == "tanh"

    def test_accumulation_looks_at_the_first_batch_of_a_step(self, loader, tmp_path):
        kept = []

        class Keeps(nn.Module):
            def forward(self, x):
                kept.append((F.relu(x) == 0).double().mean().item())
                return F.relu(x)

        # looks twice itself: the second call is not the one that is compared
        fit(Net(Keeps()), every_step(), loader, tmp_path, accumulate_grad_batches=3)
        found = rows(tmp_path, "activation", component="body")
        assert [row["step"] for row in found] == [0, 1, 2]
        assert [row["zero_share"] for row in found] == pytest.approx([kept[0], kept[3], kept[6]])

    def test_interval(self, loader, tmp_path):
        fit(Net(nn.ReLU()), every_step(every_n_steps=3), loader, tmp_path)
        assert sorted({row["step"] for row in rows(tmp_path, "activation")}) == [2, 5]

    def test_scaler(self, loader, tmp_path):
        fit(Witness(), every_step(), loader, tmp_path, plugins=[scaler_plugin()])
        assert len(rows(tmp_path, "activation", component="encoder.1")) == 8

    def test_manual_optimization_with_checkpointing(self, loader, tmp_path):
        class Manual(Net):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                hidden = torch.utils.checkpoint.checkpoint(
                    self.body, self.first(batch[0]), use_reentrant=False
                )
                self.manual_backward(self.last(hidden).mean())
                optimizer.step()

        fit(Manual(nn.ReLU()), every_step(), loader, tmp_path)
        # the backward pass runs it again, and that is not counted
        assert set(seen(tmp_path)) == {"body", None}
        assert seen(tmp_path)["body"]["calls"] == 1

    def test_compiled_parts_are_looked_at_in_an_eager_copy(self, loader, tmp_path):
        body = torch.compile(Functions(F.relu, torch.tanh), backend="eager")
        net = Net(body)
        fit(net, every_step(), loader, tmp_path)
        assert set(seen(tmp_path)) == {"body", "body#2", None}
        assert any("compiled parts" in row["message"] for row in rows(tmp_path, "notes"))

    def test_a_frozen_fused_layer_is_left_alone(self, loader, tmp_path):
        class Frozen(Net):
            def on_train_batch_start(self, *_):
                self.body.eval()

            def forward(self, x):
                with torch.no_grad():
                    hidden = self.body(self.first(x).view(-1, 1, 6)).flatten(1)
                return self.last(self.act(hidden))

        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        frozen = Frozen(layer.requires_grad_(False))
        frozen.act = nn.ReLU()
        entered = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, module, *_):
                original = torch._transformer_encoder_layer_fwd

                def fast(*args):
                    entered.append(1)
                    return original(*args)

                torch._transformer_encoder_layer_fwd = fast
                self.original = original

            def on_train_batch_end(self, *_):
                torch._transformer_encoder_layer_fwd = self.original

        fit(frozen, [every_step(), Look()], loader, tmp_path)
        assert len(entered) == 8
        assert set(seen(tmp_path)) == {"act", None}
        assert any("fused kernel" in row["message"] for row in rows(tmp_path, "notes"))

    def test_an_exception_that_a_module_catches(self, loader, tmp_path):
        class Catches(nn.Module):
            def __init__(self):
                super().__init__()
                self.bad = nn.Bilinear(2, 2, 2)

            def forward(self, x):
                try:
                    return self.bad(x)
                except TypeError:
                    return F.relu(x)

        fit(Net(Catches()), every_step(), loader, tmp_path)
        assert set(seen(tmp_path)) == {"body", None}

    def test_an_exception_in_a_module_leaves_nothing_behind(self, loader, tmp_path):
        class Fails(Functions):
            def forward(self, x):
                raise ZeroDivisionError

        net = Net(Fails())
        before = census(net)
        with pytest.raises(ZeroDivisionError):
            fit(net, every_step(), loader, tmp_path)
        assert census(net) == before

    def test_training_is_the_same(self, loader, tmp_path):
        ends = []
        for callbacks in ([], [every_step()]):
            torch.manual_seed(3)
            net = Net(nn.Sequential(nn.GELU(), nn.Dropout(0.4), nn.RReLU(inplace=True)))
            net.configure_optimizers = lambda net=net: torch.optim.Adam(net.parameters(), 0.1)
            before = census(net)
            fit(net, callbacks, loader, tmp_path / str(len(callbacks)))
            assert census(net) == before
            ends.append([*(p.detach().clone() for p in net.parameters()), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    def test_a_mode_of_the_user_still_sees_everything(self, loader, tmp_path):
        names = []

        class Users(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                names.append(getattr(func, "__name__", ""))
                return func(*args, **(kwargs or {}))

        class Inside(Net):
            def training_step(self, batch, batch_idx):
                with Users():
                    return super().training_step(batch, batch_idx)

        fit(Inside(Functions(F.relu)), every_step(), loader, tmp_path)
        assert names.count("relu") >= 8
        assert set(seen(tmp_path)) == {"body", None}


class TestMemory:
    def test_it_goes_on_after_resuming(self, loader, tmp_path):
        saver = lightning("callbacks").ModelCheckpoint(tmp_path, filename="it", save_top_k=-1)
        body = Planted(nn.ReLU(), [0, 0, -100, 0, -100, 0.0])
        first = every_step(window=10)
        fit(Net(body), [first, saver], loader, tmp_path / "a", enable_checkpointing=True)
        assert all(row["dead_share"] is None for row in rows(tmp_path / "a", "activation"))
        second, kept = every_step(window=10), {}

        class Look(Callback):
            def on_train_start(self, trainer, module):
                kept.update(deepcopy(second.state_dict()))

        arguments = {"max_epochs": 2, "ckpt_path": str(next(tmp_path.glob("*.ckpt")))}
        fit(Net(body), [second, Look()], loader, tmp_path / "b", **arguments)
        assert kept["looks"] == {"body.act": 8}
        assert kept["idle"]["body.act"][2] == 8
        found = rows(tmp_path / "b", "activation", component="body.act")
        assert [row["dead_share"] is None for row in found] == [True] + [False] * 7
        assert found[-1]["dead_units"] >= 2

    def test_a_new_fit_begins_anew(self, loader, tmp_path):
        diagnostic = every_step(window=4)
        fit(Net(nn.ReLU()), diagnostic, loader, tmp_path / "a")
        fit(Net(nn.ReLU()), diagnostic, loader, tmp_path / "b")
        assert seen(tmp_path / "b", 2)["body"]["dead_share"] is None


class TestArguments:
    @pytest.mark.parametrize("window", [0, -1, 1.5, True])
    def test_window(self, window):
        with pytest.raises(ValueError, match="`window` must be at least 1, got"):
            ActivationHealth(window=window)

    @pytest.mark.parametrize("saturation", [0.5, 1, -1])
    def test_saturation(self, saturation):
        with pytest.raises(ValueError, match=r"`saturation` must lie between 0.5 and 1, got"):
            ActivationHealth(saturation=saturation)

    def test_modules(self):
        with pytest.raises(TypeError, match="`modules` must be globs over names of modules"):
            ActivationHealth(modules=[nn.ReLU()])
        with pytest.raises(ValueError, match="`modules` must have at least one glob"):
            ActivationHealth(modules=[])

    def test_an_error_ends_it_alone(self, loader, tmp_path, monkeypatch):
        home = "lightning_diag.callbacks.activation_health_forward.flatness"
        monkeypatch.setattr(home, lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match="ActivationHealth has ended and training goes on"):
            trainer = fit(Net(nn.ReLU()), ActivationHealth(every_n_steps=1), loader, tmp_path)
        assert trainer.global_step == 8


class Gated(nn.Module):
    """A sigmoid that opens and shuts, by a view in between or at once."""

    def __init__(self, how):
        super().__init__()
        self.score = nn.Linear(6, 6)
        self.squash = nn.Sigmoid()
        self.how = how

    def forward(self, x):
        gate = self.squash(self.score(x))
        if self.how == "view":
            return x * gate.view(-1, 6)
        if self.how == "blend":
            return gate * x + (1 - gate) * torch.tanh(x)
        if self.how == "number":
            return 2.0 * gate
        return gate * x if self.how == "product" else gate


class TestWhatBecomesOfIt:
    def test_an_output_is_the_last(self, loader, tmp_path):
        class Squashed(Net):
            def training_step(self, batch, batch_idx):
                return torch.sigmoid(self(batch[0])).square().mean()

        fit(Squashed(nn.Sequential(nn.Tanh(), nn.Linear(6, 6))), every_step(), loader, tmp_path)
        found = seen(tmp_path)
        assert (found["body.0"]["last"], found["body.0"]["last_of_part"]) == (0, 0)
        assert (found["training_step"]["last"], found["training_step"]["gate"]) == (1, 0)

    def test_the_last_of_its_part(self, loader, tmp_path):
        fit(Net(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), every_step(), loader, tmp_path)
        found = seen(tmp_path)["body.1"]
        assert (found["last"], found["last_of_part"], found["gate"]) == (0, 1, None)

    @pytest.mark.parametrize(
        ("how", "gate"), [("product", 1), ("view", 1), ("blend", 1), ("number", 0), ("plain", 0)]
    )
    def test_a_gate_is_multiplied(self, loader, tmp_path, how, gate):
        fit(Net(Gated(how)), every_step(), loader, tmp_path)
        assert seen(tmp_path)["body.squash"]["gate"] == gate
