"""Feature caching in diffusion U-Nets, independent of the model: the nest, the caches, the schedules."""
