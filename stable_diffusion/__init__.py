"""Stable Diffusion 1.x, 2.x and SDXL with caching: its U-Nets, checkpoints, sampling from prompts, training."""

import sampling  # noqa: F401  before diffusers and transformers, see sampling/libraries.py
