"""Stable Diffusion 1.x, 2.x and SDXL with caching: its U-Nets, checkpoints, sampling from prompts, training."""
