"""Stable Diffusion 1.x, 2.x and SDXL with caching: its U-Nets, checkpoints, sampling from prompts, training."""

import unet_caching.samplers  # noqa: F401  before diffusers and transformers, see unet_caching/samplers/libraries.py
