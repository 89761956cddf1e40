"""The peak signal-to-noise ratio."""

from typing import overload

import numpy as np


@overload
def psnr(squared_error: float, span: float = 255.0) -> float: ...
@overload
def psnr(squared_error: np.ndarray, span: float = 255.0) -> np.ndarray: ...
def psnr(squared_error: float | np.ndarray, span: float = 255.0) -> float | np.ndarray:
    """The PSNR in decibels of a mean squared error, or of an array of them; infinite for an error of 0.

    span: the difference between the largest and the smallest possible pixel.
    """
    with np.errstate(divide="ignore"):
        return 10 * np.log10(span ** 2 / np.asarray(squared_error))[()]
