"""Does every parameter belong to the right part, once, and to the right optimizer group?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_diag import Components, param_groups
from lightning_diag.components import parameter_names
from tests.callbacks.witness import Witness, fit, lightning, rows


class Net(nn.Module):
    """Embedding, two blocks, a head tied to the embedding, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(x)))


class Holder(nn.Module):
    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def members(model: nn.Module, patterns=None) -> dict[str, list[str]]:
    assignment = Components(patterns).assign(model)
    return {part: list(parameters) for part, parameters in assignment.parameters.items()}


EVERY = {
    "embedding": ["embedding.weight"],
    "blocks": ["blocks.0.weight", "blocks.0.bias", "blocks.2.weight", "blocks.2.bias"],
    "head": ["head.weight", "head.bias"],
}


class TestDefaultParts:
    def test_are_the_children(self):
        assert members(Net()) == EVERY

    def test_are_found_below_lone_wrappers(self):
        inside = {part: [f"net.{name}" for name in names] for part, names in EVERY.items()}
        assert members(Holder("net", Net())) == inside
        assert list(members(Holder("outer", Holder("net", Net())))) == list(EVERY)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda net: torch.compile(net, backend="eager"),
            lambda net: Holder("module", net),
            lambda net: Holder("module", torch.compile(net, backend="eager")),
            lambda net: Holder("_fsdp_wrapped_module", net),
            lambda net: Holder("_checkpoint_wrapped_module", net),
        ],
        ids=["compile", "parallel", "both", "fsdp", "checkpoint"],
    )
    def test_have_the_names_of_the_unwrapped(self, wrap):
        assert members(wrap(Net())) == EVERY
        assert members(Holder("net", wrap(Net()))) == members(Holder("net", Net()))
        inner = Net()
        inner.blocks = wrap(inner.blocks)
        assert members(inner) == EVERY
        assert members(inner, {"first": "blocks.0"})["first"] == EVERY["blocks"][:2]

    def test_compiling_a_lone_layer_keeps_its_name(self):
        plain = Holder("net", nn.Linear(2, 2))
        compiled = Holder("net", torch.compile(nn.Linear(2, 2), backend="eager"))
        parallel = Holder("module", Holder("net", nn.Linear(2, 2)))
        assert members(plain) == {"net": ["net.weight", "net.bias"]}
        assert members(compiled) == members(parallel) == members(plain)

    def test_a_user_may_call_a_child_module(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = nn.Linear(2, 2)
                self.head = nn.Linear(2, 2)

        assert list(members(Two())) == ["module", "head"]
        assert members(Two())["module"] == ["module.weight", "module.bias"]

    def test_numbered_children_carry_the_name_of_their_parent(self):
        model = Holder("layers", nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)))
        assert list(members(model)) == ["layers.0", "layers.2"]
        assert list(members(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))) == [
            "layer.0",
            "layer.1",
        ]

    def test_parameters_of_the_model_itself_are_other(self):
        net = Net()
        net.scale = nn.Parameter(torch.ones(1))
        assert members(net) == EVERY | {"other": ["scale"]}
        holder = Holder("net", net)
        holder.bias = nn.Parameter(torch.ones(1))
        assert members(holder)["other"] == ["bias", "net.scale"]

    def test_children_without_parameters_are_no_parts(self):
        net = Net()
        net.loss = nn.CrossEntropyLoss()
        assert list(members(net)) == list(EVERY)

    def test_a_model_without_parameters_has_none(self):
        assert members(nn.ReLU()) == {}
        assert not any(members(nn.ReLU(), {"a": "*"}).values())

    def test_modules_are_the_parts_themselves(self):
        net = Net()
        modules = Components().assign(net).modules
        assert {part: list(found) for part, found in modules.items()} == {
            "embedding": ["embedding"],
            "blocks": ["blocks"],
            "head": ["head"],
        }
        assert modules["blocks"]["blocks"] is net.blocks


class TestPatterns:
    def test_by_hand(self):
        parts = {"first": "blocks.0", "biases": ["*.bias"], "table": "embedding.*"}
        assert members(Net(), parts) == {
            "first": EVERY["blocks"][:2],
            "biases": ["blocks.2.bias", "head.bias"],
            "table": ["embedding.weight"],
            "other": ["blocks.2.weight", "head.weight"],
        }

    @pytest.mark.parametrize(
        "glob", ["blocks", "blocks.*", "blocks.?", "blo*", "blocks.[02]", "blocks.*.*"]
    )
    def test_whole_modules(self, glob):
        assert members(Net(), {"part": glob})["part"] == EVERY["blocks"]

    def test_names_are_matched_whole(self):
        assert members(Net(), {"part": "block"})["part"] == []
        assert members(Net(), {"part": "Blocks"})["part"] == []
        assert members(Net(), {"part": "weight"})["part"] == []

    def test_the_first_that_matches_wins_and_the_rival_is_named(self):
        assignment = Components({"a": "blocks.0", "b": "blocks"}).assign(Net())
        assert list(assignment.parameters["b"]) == EVERY["blocks"][2:]
        assert assignment.notes == [
            "`a` and `b` both match `blocks.0.weight` and 1 more; `a` stands first and takes them."
        ]
        swapped = Components({"b": "blocks", "a": "blocks.0"}).assign(Net())
        assert list(swapped.parameters["b"]) == EVERY["blocks"]
        assert list(swapped.parameters["a"]) == []

    def test_one_component_may_match_twice_without_a_word(self):
        assignment = Components({"a": ["blocks", "blocks.0", "*.weight"]}).assign(Net())
        assert assignment.notes == []

    def test_no_match_is_said_with_the_nearest_names(self):
        (note,) = Components({"table": "embeding"}).assign(Net()).notes
        assert note.startswith("Pattern `embeding` of component `table` matches nothing;")
        assert "`embedding`" in note

    def test_an_empty_component_stands_all_the_same(self):
        assert list(Components({"ghost": "nothing"}).assign(Net()).names) == ["ghost", "other"]

    def test_other_is_absent_where_all_is_named(self):
        assert list(members(Net(), {"all": "*"})) == ["all"]

    @settings(deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]),
            st.lists(
                st.sampled_from(["*", "blocks", "*.bias", "head.*", "embedding", "*.0.*", "zzz"]),
                min_size=1,
                max_size=3,
            ),
        )
    )
    def test_every_parameter_belongs_to_one_part(self, patterns):
        net = Net()
        owned = [
            p
            for part in Components(patterns).assign(net).parameters.values()
            for p in part.values()
        ]
        assert sorted(map(id, owned)) == sorted(map(id, net.parameters()))


class TestTied:
    def tied(self) -> Net:
        net = Net()
        net.head.weight = net.embedding.weight
        return net

    def test_stand_once_under_the_first_name(self):
        parts = members(self.tied())
        assert parts == EVERY | {"head": ["head.bias"]}
        (note,) = Components().assign(self.tied()).notes
        assert "`head.weight` of component `head` is tied to a parameter of `embedding`" in note

    def test_belong_to_the_first_component_that_names_either(self):
        parts = members(self.tied(), {"head": "head", "table": "embedding"})
        assert sum(map(len, parts.values())) == 6
        assert len(parts["head"]) == 2
        assert parts["table"] == []

    def test_within_one_component_need_no_word(self):
        net = Net()
        net.blocks[2].weight = net.blocks[0].weight
        assert Components().assign(net).notes == []
        assert members(net)["blocks"] == ["blocks.0.weight", "blocks.0.bias", "blocks.2.bias"]

    def test_modules_used_twice_count_once(self):
        net = Net()
        net.again = net.blocks
        assert [len(names) for names in members(net).values()][:3] == [1, 4, 2]
        everyone = [name for name, _ in parameter_names(net)]
        assert "again.0.weight" in everyone
        assert "blocks.0.weight" in everyone

    def test_owners_know_every_parameter(self):
        net = self.tied()
        owners = Components().assign(net).owners()
        assert owners[id(net.head.weight)] == ("embedding", "embedding.weight")
        assert len(owners) == 6


class TestBadPatterns:
    @pytest.mark.parametrize("bad", ["head", 3, ["head"]])
    def test_not_a_mapping(self, bad):
        words = f"`components` must be a mapping of names to globs, got {type(bad).__name__}."
        with pytest.raises(TypeError, match=words):
            Components(bad)

    @pytest.mark.parametrize("name", ["", 3, None])
    def test_no_name(self, name):
        with pytest.raises(ValueError, match="A component must have a name, got"):
            Components({name: "head"})

    @pytest.mark.parametrize("globs", [[], (), 3, None])
    def test_no_glob(self, globs):
        with pytest.raises(ValueError, match="Component `a` must have at least one glob, got"):
            Components({"a": globs})

    @pytest.mark.parametrize("globs", [[""], "", [3], ["a", None]])
    def test_not_text(self, globs):
        with pytest.raises(ValueError, match="`a`"):
            Components({"a": globs})


def by_name(groups: list[dict]) -> dict[str, float | None]:
    return {group["name"]: group.get("lr") for group in groups}


class TestParamGroups:
    def test_absolute_rates(self):
        groups = param_groups(Net(), {"embedding": 1e-4, "head": 1e-2}, 1e-3)
        assert by_name(groups) == {"embedding": 1e-4, "other": 1e-3, "head": 1e-2}
        assert [len(group["params"]) for group in groups] == [1, 4, 2]

    def test_multipliers_of_a_base_rate(self):
        groups = param_groups(Net(), {"embedding": 0.1, "head": 2.0}, base_lr=1e-3)
        assert by_name(groups) == pytest.approx({"embedding": 1e-4, "other": 1e-3, "head": 2e-3})
        groups = param_groups(Net(), {"head": 2.0}, 0.5, base_lr=1e-3)
        assert by_name(groups) == pytest.approx({"other": 5e-4, "head": 2e-3})

    def test_without_a_default_the_optimizer_decides(self):
        groups = param_groups(Net(), {"head": 0.5})
        assert by_name(groups) == {"other": None, "head": 0.5}
        optimizer = torch.optim.SGD(groups, lr=0.25)
        assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {"other": 0.25, "head": 0.5}

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
    def test_every_trainable_parameter_stands_in_one_group(self, kind):
        net = Net()
        net.blocks[0].requires_grad_(False)
        net.head.weight = net.embedding.weight
        optimizer = kind(param_groups(net, {"blocks": 0.1}, 0.01), lr=1.0)
        owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in net.parameters() if p.requires_grad)

    def test_frozen_components_have_no_group(self):
        net = Net()
        net.head.requires_grad_(False)
        assert list(by_name(param_groups(net, {"head": 0.1}, 0.2))) == ["other"]

    def test_keys_may_be_globs(self):
        groups = param_groups(Net(), {"*.bias": 0.1}, 0.2)
        assert by_name(groups) == {"*.bias": 0.1, "other": 0.2}
        assert len(groups[0]["params"]) == 3

    def test_components_give_the_keys(self):
        groups = param_groups(Net(), {"ends": 0.1}, 0.2, components={"ends": ["embedding", "head"]})
        assert {group["name"]: len(group["params"]) for group in groups} == {"ends": 3, "other": 4}
        same = param_groups(
            Net(), {"ends": 0.1}, 0.2, components=Components({"ends": ["embedding", "head"]})
        )
        assert by_name(same) == by_name(groups)

    def test_zero_is_a_rate(self):
        assert by_name(param_groups(Net(), {"head": 0.0}, 1.0))["head"] == 0.0

    @pytest.mark.parametrize(("key", "near"), [("hed", "head"), ("embeding", "embedding")])
    def test_an_unknown_key_is_refused_with_the_nearest_names(self, key, near):
        words = f"A learning rate must be for a component of the model, got `{key}`; .*`{near}`"
        with pytest.raises(ValueError, match=words):
            param_groups(Net(), {key: 0.1}, 0.2)
        with pytest.raises(ValueError, match=f"got `{key}`; .*`{near}`"):
            param_groups(
                Net(), {key: 0.1}, 0.2, components={"embedding": "embedding", "head": "head"}
            )

    @pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
    def test_a_rate_must_be_finite_and_not_negative(self, bad):
        for arguments in (
            {"lrs": {"head": bad}},
            {"lrs": {}, "default": bad},
            {"lrs": {}, "base_lr": bad},
        ):
            with pytest.raises(
                ValueError, match="Learning rates must be at least 0 and finite, got"
            ):
                param_groups(Net(), **arguments)

    def test_a_schedule_keeps_the_ratios_and_the_monitor_their_names(self, loader, tmp_path):
        class Scheduled(Witness):
            def configure_optimizers(self):
                groups = param_groups(self, {"encoder": 0.1, "head": 2.0}, base_lr=0.01)
                optimizer = torch.optim.AdamW(groups)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        monitor = lightning("callbacks").LearningRateMonitor("step")
        fit(Scheduled(), [monitor], loader, tmp_path)
        found = [row for row in rows(tmp_path, "metrics") if "lr-AdamW/encoder" in row]
        assert len(found) == 8
        for row in found:
            assert row["lr-AdamW/encoder"] == pytest.approx(0.1 * row["lr-AdamW/other"])
            assert row["lr-AdamW/head"] == pytest.approx(2 * row["lr-AdamW/other"])
        assert found[-1]["lr-AdamW/head"] < found[0]["lr-AdamW/head"] / 10
