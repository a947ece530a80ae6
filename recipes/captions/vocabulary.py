"""Captions to token ids and back, with a vocabulary that knows the training split alone."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

__all__ = ["END", "PADDING", "UNKNOWN", "Vocabulary", "caption_words"]

PADDING, UNKNOWN, END = 0, 1, 2
_SPECIAL = ("<pad>", "<unk>", "<end>")


def caption_words(caption: str) -> list[str]:
    """The words of a caption, in lower case; hyphens and all other signs only part them.

    Example:
        >>> caption_words("HYPHEN-MINUS")
        ['hyphen', 'minus']
    """
    return re.findall(r"\w+", caption.lower())


class Vocabulary:
    """Words and their ids; the ids 0 to 2 are padding, an unknown word, and the end.

    Args:
        words: in the order of their ids, from 3 on.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*_SPECIAL, *words]
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, captions: Iterable[str], *, size: int, min_count: int = 1) -> "Vocabulary":
        """The commonest words of some captions; those that are equally common by the alphabet.

        Args:
            captions: of the training split.
            size: most ids, the three special ones included.
            min_count: how often a word must occur.

        Returns:
            The vocabulary.
        """
        counts = Counter(word for caption in captions for word in caption_words(caption))
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        kept = [word for word, count in ranked if count >= min_count]
        return cls(kept[: size - len(_SPECIAL)])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Ids of a caption and the end; a longer caption ends after `max_words`.

        Example:
            >>> Vocabulary(["letter", "a"]).encode("Letter B", max_words=9)
            [3, 1, 2]
        """
        words = caption_words(caption)[:max_words]
        return [*(self._ids.get(word, UNKNOWN) for word in words), END]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption up to its end.

        Example:
            >>> Vocabulary(["letter", "a"]).decode([3, 4, 2, 0, 0])
            'letter a'
        """
        return " ".join(self.words[i] for i in takewhile(lambda i: i != END, ids))
