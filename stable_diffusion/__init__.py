"""Stable Diffusion 1.x and 2.x with caching: its U-Net, diffusers pipelines in two lines, sampling from prompts."""

import sampling  # noqa: F401  before diffusers and transformers, see sampling/libraries.py
