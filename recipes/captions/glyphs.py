"""The glyphs of DejaVu Sans, as Matplotlib ships it, and their Unicode names."""

import hashlib
import importlib.util
import unicodedata
from functools import cache
from pathlib import Path

import torch
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from recipes.captions.samples import Sample, Source

__all__ = ["font_path", "glyphs", "look_alikes", "named_codes", "render"]

# combining marks, spaces and control characters have no picture of their own
_WITHOUT_PICTURE = ("M", "Z", "C")
_COMPARED_SIZE = 32
_ALIKE = 2.0  # grey levels of 255, root mean square: what rounding makes of one outline


@cache
def glyphs(size: int = 32) -> Source:
    """Every glyph that has a picture and a name.

    The font has a glyph for no character that was unnamed in Unicode 14, and a name never changes:
    a newer Python adds nothing.

    Args:
        size: height and width of the pictures.

    Returns:
        The pictures in order of code points; the caption is the Unicode name, the group the first
        code point that looks the same. The digest is that of font and names, since another version
        of Pillow may shift a pixel by some grey levels.

    Raises:
        FileNotFoundError: Matplotlib is not installed, or ships no DejaVu Sans.
    """
    path = font_path()
    codes = named_codes(path)
    drawn = {code: render(chr(code), path, size) for code in codes}
    codes = [code for code in codes if drawn[code].any()]
    # the same splits at every size
    compared = torch.stack([render(chr(code), path, _COMPARED_SIZE) for code in codes])
    samples = [
        Sample(drawn[code], unicodedata.name(chr(code)), f"U+{codes[first]:04X}")
        for code, first in zip(codes, look_alikes(compared), strict=True)
    ]
    digest = hashlib.sha256(path.read_bytes())
    for code, sample in zip(codes, samples, strict=True):
        digest.update(f"U+{code:04X} {sample.caption}\n".encode())
    return Source("glyphs of DejaVu Sans", digest.hexdigest(), samples)


def font_path() -> Path:
    """Where Matplotlib keeps DejaVuSans.ttf; Matplotlib itself is not imported.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if path.is_file():
            return path
    raise FileNotFoundError(
        "The glyphs come from the font that Matplotlib ships, mpl-data/fonts/ttf/DejaVuSans.ttf, "
        f"got {'no such file' if found else 'no Matplotlib'}."
    )


def named_codes(path: Path) -> list[int]:
    """The code points of a font that have a name and, of their kind, a picture.

    Args:
        path: a TrueType font.

    Returns:
        Code points in order.
    """
    with TTFont(str(path)) as font:
        codes = sorted(font.getBestCmap())
    return [
        code
        for code in codes
        if unicodedata.name(chr(code), "")
        and unicodedata.category(chr(code))[0] not in _WITHOUT_PICTURE
    ]


def render(text: str, path: Path, size: int) -> Tensor:
    """White on black, its middle in the middle; what is larger than the picture is cut off.

    Args:
        text: a character.
        path: a TrueType font; its size is three quarters of the picture's.
        size: height and width of the picture.

    Returns:
        Bytes, ``(1, size, size)``.
    """
    image = Image.new("L", (size, size))
    middle = (size / 2, size / 2)
    ImageDraw.Draw(image).text(middle, text, fill=255, font=_font(path, size), anchor="mm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, size, size)


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size * 3 // 4, layout_engine=ImageFont.Layout.BASIC)


def look_alikes(pictures: Tensor) -> list[int]:
    """For each picture the first that looks the same, directly or by way of others.

    Args:
        pictures: bytes, ``(pictures, ...)``.

    Returns:
        Indices; of a picture that is alone, its own.
    """
    flat = pictures.flatten(1).float()
    limit = _ALIKE * flat.shape[1] ** 0.5
    # |x - y| is at least | |x| - |y| |: only pictures of similar length need be compared
    norms, order = flat.norm(dim=1).sort()
    ends = torch.searchsorted(norms, norms + limit, right=True).tolist()
    parent = list(range(len(flat)))
    for place, end in enumerate(ends):
        near = flat[order[place + 1 : end]] - flat[order[place]]
        for other in (near.norm(dim=1) < limit).nonzero().flatten().tolist():
            one, two = (_root(parent, int(order[i])) for i in (place, place + 1 + other))
            parent[max(one, two)] = min(one, two)
    return [_root(parent, index) for index in range(len(flat))]


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        index = parent[index]
    return index
