"""Images of a thin cache: rounded, and as differences that pack well."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def encoded(image: npt.NDArray[np.int16], step: int) -> npt.NDArray[np.uint8]:
    """An image as differences to the neighbours on the two finer axes, which pack better; see `decoded`.

    Args:
        image: (K, J, I).
        step: values are rounded to multiples of it; 1 loses nothing.

    Returns:
        (2, K, J, I): low and high bytes.
    """
    rest = image if step == 1 else np.rint(image / step).clip(-(32768 // step), 32767 // step).astype(np.int16)
    for axis in (2, 1):  # wraps around, and back again when it is decoded
        rest = np.diff(rest, axis=axis, prepend=np.zeros_like(rest.take([0], axis=axis)))
    zigzag = ((rest << 1) ^ (rest >> 15)).view(np.uint16)  # small differences of either sign have an empty high byte
    return np.stack([zigzag & 0xFF, zigzag >> 8]).astype(np.uint8)


def decoded(planes: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.int16]:
    """The image that `encoded` was given, rounded to multiples of the step."""
    zigzag = planes[0] | (planes[1].astype(np.uint16) << 8)
    image: npt.NDArray[np.int16] = (zigzag >> 1).view(np.int16) ^ -(zigzag & 1).view(np.int16)
    for axis in (1, 2):
        image = image.cumsum(axis=axis, dtype=np.int16)
    return image * np.int16(step)
