"""Latent diffusion with classes (Rombach et al., arXiv 2112.10752): LDM-4-G, and the shipped emoji model."""
