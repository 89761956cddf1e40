"""Judging a run: quality, fidelity to the uncached images, MACs, wall-clock time, tables and plots."""

import sampling  # noqa: F401  before the libraries that import torchvision, see sampling/libraries.py
