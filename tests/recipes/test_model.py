import math
import re
from functools import partial

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)
from torch.utils.data import DataLoader

from lightning_diag.lightning import Callback, Trainer
from recipes.code.batches import Batch, EncodedFunctions, collate
from recipes.code.corpus import Sample
from recipes.code.data import CodeData
from recipes.code.model import CodeTransformer, warmup_cosine
from recipes.code.network import name_relations
from recipes.code.tokenizer import encode


def tiny_model(**arguments) -> CodeTransformer:
    small = {"vocabulary_size": 512, "width": 16, "layers": 2, "heads": 2, "dropout": 0.0}
    return CodeTransformer(**{**small, **arguments})


def _batch(texts: list[str], vocabulary_size: int = 512) -> Batch:
    encoded = [encode(text, vocabulary_size=vocabulary_size, max_length=512) for text in texts]
    rows = EncodedFunctions(encoded, [0] * len(texts))
    return collate([rows[i] for i in range(len(rows))])


def _rows(samples: list[Sample], vocabulary_size: int = 512) -> EncodedFunctions:
    return EncodedFunctions(
        [encode(s.func, vocabulary_size=vocabulary_size, max_length=512) for s in samples],
        [s.target for s in samples],
        [s.injected for s in samples],
    )


@pytest.fixture
def data(tmp_path, known_hosts) -> CodeData:
    return CodeData(samples=300, cache_dir=str(tmp_path), vocabulary_size=512, batch_size=32)


class Outputs(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.keys: set[str] = set()
        self.evaluated: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.keys = set(outputs)
        self.losses.append(float(outputs["loss"]))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.evaluated.append((outputs["logits"], outputs["target"], batch.injected))

    on_test_batch_end = on_validation_batch_end


def test_relations_by_hand():
    relations = name_relations(_batch(["a = 1\nb = a\nrun(b)\na = a", "x"]))
    uses_what_is_assigned = [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1]]
    assert relations[0, 0].tolist() == uses_what_is_assigned
    assert torch.equal(relations[0, 1], relations[0, 0].T)
    assert not relations[1].any()


@pytest.mark.parametrize("name_bias", [None, 4.0])
def test_padding_changes_nothing(name_bias):
    model = tiny_model(name_bias=name_bias).eval()
    long = "\n".join(f"b{i} = b{i - 1} + {i}" for i in range(30))
    alone, together = model(_batch(["a = 1\nf(a)"])), model(_batch(["a = 1\nf(a)", long]))
    torch.testing.assert_close(together[0], alone[0])


def test_more_columns_and_lines_than_are_told_apart():
    model = tiny_model(max_columns=3, max_statements=2).eval()
    assert model(_batch(["f(a, b, c)\n" * 5])).isfinite().all()


def test_names_matter_through_the_bias_alone():
    """Where all tokens are alike, only the bias can tell which lines share a name."""
    linked, apart = "a = 1\nb = a\nc = b", "a = 1\nb = x\nc = y"
    for name_bias, equal in ((4.0, False), (None, True)):
        model = tiny_model(name_bias=name_bias).eval()
        with torch.no_grad():
            model.embedding.token.weight.fill_(0.1)
        assert torch.allclose(model(_batch([linked])), model(_batch([apart]))) is equal


def test_a_training_run(data, quiet, capsys):
    outputs = Outputs()
    trainer = Trainer(**{**quiet, "max_epochs": 2}, logger=False, callbacks=[outputs])
    model = tiny_model()
    assert [name for name, child in model.named_children() if list(child.parameters())] == [
        "embedding",
        "encoder",
        "head",
    ]
    trainer.fit(model, datamodule=data)
    assert outputs.keys == {"loss", "logits", "target"}
    assert all(map(math.isfinite, outputs.losses))
    names = ["loss", "f1", "precision", "recall", "accuracy", "auc", "auc_within_injected"]
    assert {f"val_{name}" for name in names} | {"train_loss"} <= set(trainer.callback_metrics)
    assert model.class_weights.tolist() == [1.0, 3.0]
    assert re.search(r"AUC within injected [01]\.\d{3}", capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_equal_those_of_scikit_learn(stage, data, quiet):
    outputs = Outputs()
    trainer = Trainer(**quiet, logger=False, callbacks=[outputs])
    torch.manual_seed(0)
    run = trainer.validate if stage == "val" else trainer.test
    (metrics,) = run(tiny_model(), datamodule=data, verbose=False)
    logits, target, injected = (torch.cat(parts) for parts in zip(*outputs.evaluated, strict=True))
    score = (logits[:, 1] - logits[:, 0]).double()
    predicted = score > 0
    for name, function in (
        ("f1", f1_score),
        ("precision", partial(precision_score, zero_division=0)),
        ("recall", recall_score),
        ("accuracy", accuracy_score),
    ):
        assert metrics[f"{stage}_{name}"] == pytest.approx(function(target, predicted), abs=1e-6)
    assert metrics[f"{stage}_auc"] == pytest.approx(roc_auc_score(target, score), abs=1e-3)
    assert metrics[f"{stage}_auc_within_injected"] == pytest.approx(
        roc_auc_score(target[injected], score[injected]), abs=2e-3
    )
    weight = torch.tensor([1.0, 3.0])
    log_p = logits.double().log_softmax(1)[torch.arange(len(target)), target]
    by_batch = [
        -(weight[t] * p).sum() / weight[t].sum()
        for p, t in zip(log_p.split(32), target.split(32), strict=True)
    ]
    sizes = torch.tensor([len(t) for t in target.split(32)])
    expected = (torch.stack(by_batch) * sizes).sum() / sizes.sum()
    assert metrics[f"{stage}_loss"] == pytest.approx(float(expected), abs=1e-4)


def test_without_knowledge_of_injection_there_is_no_auc_within(tmp_path, quiet):
    path = tmp_path / "own.jsonl"
    path.write_text('{"code": "a = 1", "label": 0}\n{"code": "b = a", "label": 1}\n')
    data = CodeData(train_path=str(path), val_path=str(path), vocabulary_size=512)
    trainer = Trainer(**quiet, logger=False)
    trainer.fit(tiny_model(), datamodule=data)
    assert "val_f1" in trainer.callback_metrics
    assert "val_auc_within_injected" not in trainer.callback_metrics


def test_thirty_two_functions_are_learnt_by_heart(corpus, quiet):
    torch.manual_seed(0)
    injected = [sample for sample in corpus if sample.injected][:32]
    rows = _rows(injected)
    assert 5 < sum(rows.targets) < 27
    loader = DataLoader(rows, batch_size=32, collate_fn=collate)
    outputs = Outputs()
    trainer = Trainer(
        **{**quiet, "max_epochs": 60}, logger=False, callbacks=[outputs], gradient_clip_val=1.0
    )
    model = tiny_model(width=32, optimizer=partial(torch.optim.AdamW, lr=5e-3))
    trainer.fit(model, loader)
    assert outputs.losses[-1] < 0.3 * outputs.losses[0]
    assert outputs.losses[-1] < 0.1


def test_component_learning_rates_are_factors(data, quiet):
    optimizer = partial(torch.optim.SGD, lr=0.2)
    model = tiny_model(optimizer=optimizer, component_lrs={"encoder": 0.1}, warmup_share=0.0)
    Trainer(**quiet, logger=False).fit(model, datamodule=data)
    (made,) = model.trainer.optimizers
    first = {group["name"]: group["initial_lr"] for group in made.param_groups}
    assert first.pop("encoder") == pytest.approx(0.02)
    assert set(first.values()) == {0.2}
    held = {id(p) for group in made.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_the_rate_rises_falls_and_ends_at_zero(data, quiet):
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = Trainer(**{**quiet, "max_epochs": 3}, logger=False, callbacks=[Rates()])
    model = tiny_model(optimizer=partial(torch.optim.SGD, lr=1.0), warmup_share=0.25)
    trainer.fit(model, datamodule=data)
    steps = len(rates)
    warmup = round(steps / 4)
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert rates[warmup:] == pytest.approx(
        [
            (1 + math.cos(math.pi * (i - warmup) / (steps - warmup))) / 2
            for i in range(warmup, steps)
        ]
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_schedule_of_one_step():
    assert warmup_cosine(0, steps=1, warmup_share=0.1) == 1
    assert warmup_cosine(0, steps=1, warmup_share=1.0) == 1
    assert warmup_cosine(1, steps=1, warmup_share=1.0) == 1
    assert warmup_cosine(99, steps=10, warmup_share=0.1) == 0


def test_a_run_without_end_is_refused(data, quiet):
    trainer = Trainer(**{**quiet, "max_epochs": -1}, logger=False)
    with pytest.raises(ValueError, match="`max_epochs` or `max_steps` must be given"):
        trainer.fit(tiny_model(), datamodule=data)


def test_a_checkpoint_brings_back_the_model(data, quiet, tmp_path):
    model = tiny_model()
    trainer = Trainer(**quiet, logger=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = CodeTransformer.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    batch = _batch(["a = input()\nb = a\nos.system(b)"])
    torch.testing.assert_close(again.eval()(batch), model.eval()(batch))
    assert again.class_weights.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 1}, "`heads` must be at least 2 and divide `width`, got 1 and 16."),
        ({"heads": 3}, "`heads` must be at least 2 and divide `width`, got 3 and 16."),
        ({"layers": 0}, "`layers` must be at least 1, got 0."),
        ({"warmup_share": 2.0}, "`warmup_share` must be between 0 and 1, got 2.0."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model(**arguments)


def _seeded(**arguments) -> CodeTransformer:
    torch.manual_seed(3)
    return tiny_model(**arguments)


def test_init_scale_multiplies_the_weights_of_linear_layers_and_nothing_else():
    usual, large = _seeded().state_dict(), _seeded(init_scale=4.0).state_dict()
    linear = {
        name
        for name in usual
        if re.search(r"(projection|output|feed_forward\.\d|linear)\.weight$", name)
    }
    assert len(linear) == 2 * 4 + 1
    for name, value in usual.items():
        assert torch.equal(large[name], value * (4.0 if name in linear else 1.0)), name


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "leaky_relu", "tanh"])
def test_the_activation_of_the_feed_forward_nets(activation):
    model = _seeded(activation=activation).eval()
    x = torch.linspace(-3, 3, 16)
    for block in model.encoder.blocks:
        hidden = block.feed_forward[0](x)
        assert torch.equal(
            block.feed_forward(x),
            block.feed_forward[2](getattr(torch.nn.functional, activation)(hidden)),
        )


def test_the_usual_start_is_bit_for_bit_the_default():
    given = _seeded(activation="gelu", init_scale=1.0).state_dict()
    assert all(torch.equal(value, given[name]) for name, value in _seeded().state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "gelo"}, r"`activation` must be one of \('gelu', .*\), got 'gelo'\."),
        ({"init_scale": 0.0}, r"`init_scale` must be positive and finite, got 0\.0\."),
        ({"init_scale": math.inf}, r"`init_scale` must be positive and finite, got inf\."),
        ({"init_scale": math.nan}, r"`init_scale` must be positive and finite, got nan\."),
    ],
)
def test_a_start_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)
