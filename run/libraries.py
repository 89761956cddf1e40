"""diffusers and transformers for the models, imported once torchvision can be (unet_caching/libraries.py)."""

import unet_caching  # noqa: F401, I001  its import makes torchvision importable
import diffusers  # noqa: F401
import transformers  # noqa: F401
