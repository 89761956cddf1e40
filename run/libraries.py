"""diffusers and transformers for the models, imported once torchvision can be (unet_caching/libraries.py)."""

from unet_caching.libraries import let_torchvision_import

let_torchvision_import()

import diffusers  # noqa: E402, F401
import transformers  # noqa: E402, F401
