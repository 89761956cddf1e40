"""Pixel-space DDPM (Ho et al., arXiv 2006.11239): CIFAR-10, LSUN bedroom and church, and the shipped emoji model."""
