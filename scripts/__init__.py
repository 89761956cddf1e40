"""Commands over the whole project: the demo, the emoji images, one script per table."""

import sampling  # noqa: F401  before diffusers and transformers, see sampling/libraries.py
