"""What can be had without a network: `python -m recipes.captions.baselines` prints it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.captions.data import CaptionsData

__all__ = ["caption_baselines", "image_baselines"]

_SMOOTHING = 0.1
_RANKS = (16, 32, 64, 128)


def image_baselines(train: Tensor, test: Tensor, ranks: Sequence[int] = _RANKS) -> dict[str, float]:
    """Mean squared error of the mean picture, and of the first principal components.

    Args:
        train: what mean and components are taken from, ``(pictures, pixels)``.
        test: what is drawn, ``(pictures, pixels)``.
        ranks: numbers of components.

    Returns:
        Errors by name.
    """
    mean = train.double().mean(dim=0)
    # the eigenvectors of the covariance, the largest last
    directions = torch.linalg.eigh(torch.cov(train.double().T)).eigenvectors
    centred = test.double() - mean
    errors = {"mean": centred.square().mean().item()}
    for rank in ranks:
        kept = directions[:, -rank:]
        errors[f"PCA {rank}"] = (centred - centred @ kept @ kept.T).square().mean().item()
    return errors


def caption_baselines(
    train: Sequence[Sequence[int]], test: Sequence[Sequence[int]], size: int
) -> dict[str, float]:
    """Perplexity and accuracy of counts: of words, and of words after the one before.

    Args:
        train: captions whose words are counted, ids with the end.
        test: captions that are predicted.
        size: number of ids. One that was never seen counts as a tenth of an occurrence; what
            follows a word is counted together with one occurrence that is spread over all words
            as they occur.

    Returns:
        Scores by name.
    """
    start = size
    single = torch.full((size,), _SMOOTHING, dtype=torch.float64)
    pairs = torch.zeros(size + 1, size, dtype=torch.float64)
    for before, word in _pairs(train, start):
        single[word] += 1
        pairs[before, word] += 1
    unigram = single / single.sum()
    bigram = (pairs + unigram) / (pairs.sum(dim=1, keepdim=True) + 1)
    found = _pairs(test, start)
    guesses = bigram.argmax(dim=1).tolist()
    nll = [0.0, 0.0]
    for before, word in found:
        nll[0] -= math.log(unigram[word])
        nll[1] -= math.log(bigram[before, word])
    return {
        "unigram perplexity": math.exp(nll[0] / len(found)),
        "bigram perplexity": math.exp(nll[1] / len(found)),
        "bigram accuracy": sum(guesses[b] == word for b, word in found) / len(found),
    }


def _pairs(captions: Sequence[Sequence[int]], start: int) -> list[tuple[int, int]]:
    return [
        (before, word)
        for caption in captions
        for before, word in zip([start, *caption], caption, strict=False)
    ]


def main() -> None:
    """Print the baselines of the glyphs, learnt on the training split, for the test split."""
    data = CaptionsData()
    data.setup("test")
    train, test = data.datasets["train"], data.datasets["test"]
    seen, drawn = (one.images.flatten(1).float() / 255 for one in (train, test))
    for name, value in image_baselines(seen, drawn).items():
        print(f"{name}: mean squared error {value:.5f}")
    told, said = ([ids.tolist() for ids in one.tokens] for one in (train, test))
    for name, value in caption_baselines(told, said, len(data.vocabulary)).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
