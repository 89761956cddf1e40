"""Caching in diffusers' own U-Nets and pipelines: their modules in the nest, and what tells one run from the next."""

import sampling  # noqa: F401  before diffusers, see sampling/libraries.py
