"""Numbers that other programs gave for data that anyone can make again; programs and versions stand beside them."""

import numpy as np
import pytest
from PIL import Image

from eval.metrics.frechet import frechet_distance, mean_and_covariance
from eval.metrics.inception_scores import precision_recall
from eval.metrics.pixel_pairs import SSIM


def smooth(seed, size=32, n=3):
    """Random images, uint8 [n, size, size, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
                     for image in small])


def test_ssim_is_that_of_scikit_image():
    """scikit-image 0.26.0: structural_similarity(x, y, channel_axis=2, data_range=255, gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False), as Wang et al.; torchmetrics 1.9.0 has 0.9843, 0.8627, 0.4920."""
    x = smooth(0)
    noise = np.random.default_rng(1).normal(size=x.shape) * np.array([4, 15, 40])[:, None, None, None]
    found = SSIM.of(x, (x + noise).clip(0, 255).astype(np.uint8))
    assert found == pytest.approx([0.9892277324449652, 0.8806781562557128, 0.5341371547101672], abs=1e-12)
    least = x[:, :11, :11]      # one window
    assert SSIM.of(least, least) == pytest.approx([1, 1, 1], abs=1e-12)


def features():
    """Of 300 samples and 400 references, float32 [n, 16]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 16)) @ rng.normal(size=(16, 16))
    y = rng.normal(size=(400, 16)) @ rng.normal(size=(16, 16)) + 0.5
    return x.astype(np.float32), y.astype(np.float32)


def test_frechet_distance_is_that_of_pytorch_fid():
    """pytorch-fid 0.3.0: calculate_frechet_distance of means and covariances in float64."""
    found = frechet_distance(*(part for one in features() for part in mean_and_covariance([one])))
    assert found == pytest.approx(134.17218276820302, rel=1e-7)


def test_precision_and_recall_are_those_of_prdc():
    """prdc 0.2: compute_prdc(reference, samples, nearest_k=3)."""
    assert precision_recall(*features()) == pytest.approx((0.19, 0.3025))
