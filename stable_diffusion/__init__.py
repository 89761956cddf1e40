"""Stable Diffusion 1.x, 2.x and SDXL with caching: its U-Net, diffusers pipelines in two lines, sampling from prompts."""

import sampling  # noqa: F401  before diffusers and transformers, see sampling/libraries.py
