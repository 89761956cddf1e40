"""Judging a run: quality, fidelity to the uncached images, MACs, wall-clock time, tables and plots."""

import unet_caching.samplers  # noqa: F401  before the libraries that import torchvision, see unet_caching/samplers/libraries.py
