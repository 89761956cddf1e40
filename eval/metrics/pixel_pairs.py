"""PSNR, SSIM and root mean squared error of pairs of images."""

import numpy as np
import torch

from eval.metrics.measure import PixelMeasure
from run.psnr import psnr

_SSIM_WINDOW = 11


def _psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return psnr(np.square(x.astype(np.float64) - y).mean(axis=(1, 2, 3)))


def _ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean over the positions where the usual 11 x 11 Gaussian window lies within the image (Wang et al., IEEE
    Transactions on Image Processing 13(4), 2004; scikit-image does the same). torchmetrics' own mean includes the
    edges, with reflected images: at 32 pixels it is 0.973 instead of 0.977, and 0.796 instead of 0.829."""
    from torchmetrics.functional.image import structural_similarity_index_measure
    # In float32 the variances inside SSIM cancel: the SSIM of an image and itself came out at 0.99992.
    a, b = (torch.tensor(one).permute(0, 3, 1, 2).double() for one in (x, y))
    _, at = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none", return_full_image=True)
    edge = _SSIM_WINDOW // 2
    return at[:, :, edge:-edge, edge:-edge].mean((1, 2, 3)).numpy()


def _rmse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x.astype(np.float64) - y).mean(axis=(1, 2, 3)))


PSNR = PixelMeasure("PSNR", higher=True, key="psnr", label="PSNR (dB)", of=_psnr)
SSIM = PixelMeasure("SSIM", higher=True, key="ssim", label="SSIM", smallest=_SSIM_WINDOW, of=_ssim)
# In levels of 255. "Converged" is a run of so many steps that twice as many change nothing (eval/fidelity.py).
RMSE_TO_CONVERGED = PixelMeasure("RMSE to converged", "rmse_converged", "RMSE to converged", key="rmse_converged",
                                 label="RMSE to converged", of=_rmse)
