"""PSNR and SSIM of images to their partners."""

import numpy as np
import torch

from eval.metrics.measure import PixelMeasure
from runs.psnr import psnr

_SSIM_WINDOW = 11


def _psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return psnr(np.square(x.astype(np.float64) - y).mean(axis=(1, 2, 3)))


def _ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """With the usual 11 x 11 Gaussian window (torchmetrics')."""
    from torchmetrics.functional.image import structural_similarity_index_measure
    # In float32 the variances inside SSIM cancel: an image and itself came out at 0.99992.
    a, b = (torch.tensor(one).permute(0, 3, 1, 2).double() for one in (x, y))
    found = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
    return torch.as_tensor(found).reshape(-1).numpy()


PSNR = PixelMeasure("PSNR", higher=True, key="psnr", label="PSNR (dB)", of=_psnr)
SSIM = PixelMeasure("SSIM", higher=True, key="ssim", label="SSIM", smallest=_SSIM_WINDOW, of=_ssim)
