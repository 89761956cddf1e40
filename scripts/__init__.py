"""Commands over the whole project: the demo, the emoji images, one script per table."""

import unet_caching.samplers  # noqa: F401  before diffusers and transformers, see unet_caching/samplers/libraries.py
