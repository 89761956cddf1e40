"""The peak signal-to-noise ratio."""

from typing import overload

import numpy as np


@overload
def psnr(squared_error: float, span: float = 255.0) -> float: ...
@overload
def psnr(squared_error: np.ndarray, span: float = 255.0) -> np.ndarray: ...
def psnr(squared_error: float | np.ndarray, span: float = 255.0) -> float | np.ndarray:
    """Decibels, from a mean squared error or an array of them; infinite where it is 0.

    span: the largest less the smallest value that a pixel can have.
    """
    with np.errstate(divide="ignore"):
        return 10 * np.log10(span ** 2 / np.asarray(squared_error))[()]
