"""Are the losses the formulae, and are exactly the parts without gradient that were skipped?"""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from lightning_diag.lightning import Trainer
from recipes.captions.data import Batch
from recipes.captions.losses import contrastive_alignment, norm_alignment
from recipes.captions.model import CaptionAutoencoder, cosine_with_warmup
from recipes.captions.network import Aligner, TextDecoder
from recipes.captions.vocabulary import END, PADDING, UNKNOWN


def tiny(**arguments) -> CaptionAutoencoder:
    torch.manual_seed(0)
    small = {"image_size": 16, "image_width": 8, "latent": 8, "text_width": 16, "text_heads": 2}
    small |= {"vocabulary_size": 24, "max_words": 6, "dropout": 0.0}
    return CaptionAutoencoder(**{**small, **arguments})


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 24, (5, 7), generator=generator)
    for i, length in enumerate((6, 4, 1, 3, 2)):
        tokens[i, length] = END
        tokens[i, length + 1 :] = PADDING
    return Batch(torch.rand(5, 1, 16, 16, generator=generator), tokens)


# ---- losses ----


def test_the_alignment_of_the_original_by_hand():
    latent = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # norms 5 and 1, mean 3
    image = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])
    drawn = torch.tensor([[[[0.2, 1.0]]], [[[0.5, 0.1]]]])  # mean error 0.6 / 4
    assert norm_alignment(latent, drawn, image).item() == pytest.approx(3 - (1 - 0.15))
    assert norm_alignment(latent * 0.1, drawn, image).item() == pytest.approx(0.85 - 0.3)


def test_the_alignment_of_the_original_pins_the_norm_and_sees_no_caption():
    """Its least value is a norm of 1 - L1, whatever the directions are."""
    image = torch.rand(4, 1, 8, 8)
    for directions in (torch.ones(4, 6), torch.eye(4, 6), -torch.ones(4, 6)):
        pinned = torch.nn.functional.normalize(directions, dim=1) * 0.75
        drawn = image + 0.25
        assert norm_alignment(pinned, drawn, image).item() == pytest.approx(0, abs=1e-6)


def test_contrastive_alignment_against_numpy():
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((2, 6, 5))
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in v] for a in u])
    scores = cosines / 0.1
    rows = np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)
    columns = np.log(np.exp(scores).sum(axis=0)) - np.diag(scores)
    found = contrastive_alignment(torch.tensor(u), torch.tensor(v))
    assert found.item() == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-5)


def test_contrastive_alignment_cannot_be_met_by_collapse():
    same = torch.ones(8, 4)
    assert contrastive_alignment(same, same).item() == pytest.approx(math.log(8), rel=1e-6)
    apart = torch.eye(8)
    assert contrastive_alignment(apart, apart).item() < 0.01
    assert contrastive_alignment(3 * apart, apart) == contrastive_alignment(apart, apart)


@pytest.mark.parametrize("alignment", ["contrastive", "seed"])
def test_the_parts_of_the_loss(batch, alignment):
    model = tiny(alignment=alignment)
    outputs = model(batch)
    parts = model.losses(batch, outputs)
    drawn, image = outputs.image.detach().double().numpy(), batch.image.double().numpy()
    assert parts["image"].item() == pytest.approx(((drawn - image) ** 2).mean(), rel=1e-5)
    log_p = outputs.logits.detach().double().log_softmax(-1)
    chosen = log_p.gather(2, batch.tokens.unsqueeze(-1)).squeeze(-1)
    real = batch.tokens != PADDING
    assert parts["caption"].item() == pytest.approx(-chosen[real].mean().item(), rel=1e-5)
    if alignment == "seed":
        z = outputs.latent.detach().double().numpy()
        expected = abs(np.linalg.norm(z, axis=1).mean() - (1 - abs(drawn - image).mean()))
        assert parts["alignment"].item() == pytest.approx(expected, rel=1e-5)
        assert model.aligner is None


def test_a_picture_is_between_black_and_white(batch):
    model = tiny()
    torch.nn.init.normal_(model.image_decoder.linear.weight, std=100.0)
    drawn = model(batch).image
    assert drawn.shape == batch.image.shape
    assert drawn.min() >= 0
    assert drawn.max() <= 1


# ---- text decoder ----


def test_no_word_sees_what_follows(batch):
    model = tiny()
    logits = model(batch).logits
    for place in range(1, batch.tokens.shape[1]):
        changed = batch.tokens.clone()
        changed[:, place:] = 3 + (changed[:, place:] + 1) % 20
        other = model(batch._replace(tokens=changed)).logits
        torch.testing.assert_close(other[:, : place + 1], logits[:, : place + 1])
    assert not torch.allclose(other[:, 0] * 0, model(batch).logits[:, 1])


def test_every_word_sees_the_picture_and_the_words_before(batch):
    model = tiny()
    image = batch.image.clone().requires_grad_()
    logits = model(batch._replace(image=image)).logits
    for place in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(logits[0, place].sum(), image, retain_graph=True)
        assert slope[0].abs().sum() > 0
        assert slope[1:].abs().sum() == 0
    changed = batch.tokens.clone()
    changed[0, 0] = 3 + (changed[0, 0] - 2) % 20
    other = model(batch._replace(tokens=changed)).logits
    assert (other[0, 3:6] - logits[0, 3:6]).abs().min(dim=0).values.max() > 0


def test_without_the_transformer_it_is_a_bigram_that_sees_the_picture_once(batch):
    model = tiny(skip_text_decoder=True)
    image = batch.image.clone().requires_grad_()
    logits = model(batch._replace(image=image)).logits
    for place in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(
            logits[0, place].sum(), image, retain_graph=True, allow_unused=True
        )
        assert bool(slope.abs().sum() > 0) == (place == 0)
    changed = batch.tokens.clone()
    changed[0, 0] = 3 + (changed[0, 0] - 2) % 20
    other = model(batch._replace(tokens=changed)).logits
    changes = (other[0] - logits[0]).abs().sum(dim=1) > 0
    assert changes.nonzero().flatten().tolist() == [1]


def test_padding_changes_nothing(batch):
    model = tiny()
    logits = model(batch).logits
    alone = Batch(batch.image[3:4], batch.tokens[3:4, :4])
    torch.testing.assert_close(model(alone).logits[0], logits[3, :4])
    longer = torch.nn.functional.pad(batch.tokens[:, :6], (0, 1), value=PADDING)
    shorter = batch._replace(tokens=batch.tokens[:, :6])
    loss = [model.losses(b, model(b))["caption"] for b in (batch._replace(tokens=longer), shorter)]
    torch.testing.assert_close(*loss)


def test_who_may_look_at_whom():
    decoder = TextDecoder(9, 4, 8, 1, 2, 0.0, prefix=2, max_words=3)
    mask = decoder._mask(torch.tensor([[5, PADDING]]))
    assert mask.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]]]


def test_greedy_words_are_the_likeliest_given_those_before(batch):
    model = tiny().eval()
    latent = model.encoder(batch.image)
    said = model.text_decoder.generate(latent)
    assert said.shape == (5, 7)
    assert said[:, -1].tolist() == [END] * 5
    assert not (said == PADDING).any()
    logits = model.text_decoder(latent, said)
    assert torch.equal(logits.argmax(-1)[:, :-1], said[:, :-1])


def test_a_caption_is_the_mean_of_its_words():
    torch.manual_seed(0)
    aligner = Aligner(latent=3, width=4)
    words, latent = torch.randn(2, 5, 4), torch.randn(2, 3)
    filled = torch.tensor([[True, True, False, False, False], [False] * 5])
    image, caption = aligner(latent, words, filled)
    torch.testing.assert_close(image, latent @ aligner.image.weight.T + aligner.image.bias)
    mean = torch.stack([words[0, :2].mean(dim=0), torch.zeros(4)])
    torch.testing.assert_close(caption, mean @ aligner.caption.weight.T + aligner.caption.bias)


# ---- gradients ----


def without_gradient(model, batch):
    loss = sum(model.losses(batch, model(batch)).values())
    loss.backward()
    return {name for name, weight in model.named_parameters() if weight.grad is None}


@pytest.mark.parametrize("alignment", ["contrastive", "seed"])
def test_every_parameter_gets_a_gradient(batch, alignment):
    model = tiny(alignment=alignment)
    assert without_gradient(model, batch) == set()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("alignment", ["contrastive", "seed"])
def test_what_is_skipped_gets_none_and_nothing_else(batch, alignment):
    model = tiny(alignment=alignment, skip_text_decoder=True)
    transformer = {name for name, _ in model.named_parameters() if ".transformer." in name}
    assert without_gradient(model, batch) == transformer
    assert len(transformer) == 2 * 12 + 2


# ---- metrics ----


def test_metrics_against_numpy_and_scikit_learn(batch, quiet):
    model = tiny(skip_text_decoder=False)
    halves = [Batch(*(x[:3] for x in batch)), Batch(*(x[3:] for x in batch))]
    trainer = Trainer(**quiet, logger=False)
    loader = torch.utils.data.DataLoader(halves, batch_size=None)
    (found,) = trainer.validate(model, loader, verbose=False)
    model.eval()
    with torch.no_grad():
        outputs = [model(half) for half in halves]
        parts = [model.losses(half, made) for half, made in zip(halves, outputs, strict=True)]
        said = model.text_decoder.generate(torch.cat([one.latent for one in outputs]))
    error = np.concatenate([o.image.double() for o in outputs]) - batch.image.double().numpy()
    assert found["val_image_mse"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert found["val_image_l1"] == pytest.approx(abs(error).mean(), rel=1e-5)
    assert found["val_image_mse"] == pytest.approx(found["val_loss_image"], rel=1e-5)
    real = batch.tokens != PADDING
    log_p = torch.cat([o.logits for o in outputs]).double().log_softmax(-1)[real]
    right = batch.tokens[real]
    assert found["val_caption_accuracy"] == pytest.approx(accuracy_score(right, log_p.argmax(-1)))
    nll = -log_p[torch.arange(len(right)), right].mean()
    assert found["val_caption_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert found["val_caption_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    exact = [
        all(a == b and b != UNKNOWN for a, b in zip(s, t[t != PADDING], strict=False))
        for s, t in zip(said, batch.tokens, strict=True)
    ]
    assert found["val_caption_exact"] == pytest.approx(np.mean(exact))
    for name, weights in (("image", 3), ("alignment", 3)):
        expected = sum(w * p[name].item() for w, p in zip((weights, 2), parts, strict=True)) / 5
        assert found[f"val_loss_{name}"] == pytest.approx(expected, rel=1e-5)
    whole = 20 * found["val_loss_image"] + found["val_loss_caption"]
    whole += 0.5 * found["val_loss_alignment"]
    assert found["val_loss"] == pytest.approx(whole, rel=1e-5)


def test_a_caption_with_an_unknown_word_is_never_right(batch, quiet, monkeypatch):
    model = tiny()
    tokens = torch.tensor([[5, 6, END, PADDING], [5, UNKNOWN, END, PADDING], [5, END, 0, 0]])
    told = torch.tensor([[5, 6, END, 9, 9], [5, UNKNOWN, END, 9, 9], [6, END, 9, 9, 9]])
    monkeypatch.setattr(model.text_decoder, "generate", lambda latent: told)
    loader = torch.utils.data.DataLoader([Batch(batch.image[:3], tokens)], batch_size=None)
    (found,) = Trainer(**quiet, logger=False).test(model, loader, verbose=False)
    assert found["test_caption_exact"] == pytest.approx(1 / 3)


# ---- the rest ----


def test_schedule():
    rates = [cosine_with_warmup(i, steps=10, warmup_share=0.2) for i in range(11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)])
    assert cosine_with_warmup(0, steps=1, warmup_share=0.0) == 1


def test_component_learning_rates_are_factors(batch, quiet):
    model = tiny(
        optimizer=partial(torch.optim.SGD, lr=0.2),
        component_lrs={"encoder": 0.1},
        warmup_share=0.0,
    )
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    Trainer(**quiet, logger=False).fit(model, loader)
    (made,) = model.trainer.optimizers
    first = {group["name"]: group["initial_lr"] for group in made.param_groups}
    assert first.pop("encoder") == pytest.approx(0.02)
    assert set(first.values()) == {0.2}


def test_a_run_without_end_is_refused(batch, quiet):
    trainer = Trainer(**{**quiet, "max_epochs": -1}, logger=False)
    with pytest.raises(ValueError, match="`max_epochs` or `max_steps` must be given"):
        trainer.fit(tiny(), torch.utils.data.DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 24}, "`image_size` must be a power of 2, at least 8, got 24."),
        ({"image_size": 4}, "`image_size` must be a power of 2, at least 8, got 4."),
        ({"image_width": 12}, "`image_width` must be a multiple of 8, got 12."),
        ({"text_heads": 3}, "`text_heads` must divide `text_width`, got 3 and 16."),
        (
            {"alignment": "cosine"},
            "`alignment` must be one of ('contrastive', 'seed'), got 'cosine'.",
        ),
        ({"warmup_share": -1.0}, "`warmup_share` must be between 0 and 1, got -1.0."),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(**arguments)
