"""Six views of a small image: what each keeps, and what it loses."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["VIEWS", "Array", "gradients", "left", "moments", "profiles", "right", "spectrum"]

Array = NDArray[np.float64]


def left(images: Array) -> Array:
    """The left half's pixels: its strokes as they are, nothing of the right half.

    Args:
        images: grey levels, ``(images, height, width)``, as for the other views.

    Returns:
        One row an image; 32 numbers for 8 x 8 pixels.
    """
    return images[:, :, : images.shape[2] // 2].reshape(len(images), -1)


def right(images: Array) -> Array:
    """The right half's pixels, 32 numbers; it shares no pixel with `left`."""
    return images[:, :, images.shape[2] // 2 :].reshape(len(images), -1)


def spectrum(images: Array) -> Array:
    """Magnitudes of the two-dimensional Fourier transform, 40 numbers.

    They keep how much of each stripe pattern there is. Without the phases they lose where things
    are: an image and its cyclic shift, or its turn by 180 degrees, look the same.
    """
    magnitude = np.abs(np.fft.rfft2(images))
    return np.log1p(magnitude).reshape(len(images), -1)


def gradients(images: Array) -> Array:
    """Histograms of edge directions: 8 bins in each quarter of the image, 32 numbers.

    They keep which way strokes run, roughly where; they lose grey levels and exact places.
    """
    down, across = np.gradient(images, axis=(1, 2))
    strength = np.hypot(down, across)
    turn = np.arctan2(down, across) / (2 * np.pi) % 1
    bins = np.minimum((turn * 8).astype(int), 7)
    weights = strength[..., None] * (bins[..., None] == np.arange(8))
    count, height, width, _ = weights.shape
    cells = weights.reshape(count, 2, height // 2, 2, width // 2, 8).sum(axis=(2, 4))
    roots: Array = np.sqrt(cells).reshape(count, -1)
    return roots


def profiles(images: Array) -> Array:
    """How much ink each row and each column holds, 16 numbers: two shadows of the image.

    They keep where the ink lies along each axis, and lose what lies where in a row. They are sums
    of pixels, so whoever has both halves has them.
    """
    return np.concatenate([images.sum(axis=2), images.sum(axis=1)], axis=1)


def moments(images: Array) -> Array:
    """Mass, centre, and central moments of order 2 to 4 over the mass, 15 numbers.

    They keep size, place, slant and lopsidedness of the ink as a whole, and lose all detail.
    """
    count, height, width = images.shape
    y, x = np.mgrid[:height, :width].astype(float)
    mass = np.maximum(images.sum(axis=(1, 2)), 1e-9)
    centre_y, centre_x = ((images * axis).sum(axis=(1, 2)) / mass for axis in (y, x))
    v, u = y - centre_y[:, None, None], x - centre_x[:, None, None]
    orders = [(total - q, q) for total in (2, 3, 4) for q in range(total + 1)]
    central = [(images * u**p * v**q).sum(axis=(1, 2)) / mass for p, q in orders]
    # odd roots bring them back to one length, and their tails in
    rooted = [
        np.sign(one) * np.abs(one) ** (1 / (p + q))
        for one, (p, q) in zip(central, orders, strict=True)
    ]
    return np.stack([mass, centre_x, centre_y, *rooted], axis=1).reshape(count, -1)


# in the order in which a smaller number of views takes them
VIEWS: dict[str, Callable[[Array], Array]] = {
    "left": left,
    "right": right,
    "spectrum": spectrum,
    "gradients": gradients,
    "profiles": profiles,
    "moments": moments,
}
