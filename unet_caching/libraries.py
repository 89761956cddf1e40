"""Makes torchvision importable beside a CPU-only PyTorch, for the libraries that import it: diffusers, transformers...

Package registries carry one torchvision wheel, built for CUDA. Beside a CPU-only torch its compiled operators do not
load, and its import then fails where it describes them. Nothing here needs those operators (they are for detection),
so the description is left out. Where torch and torchvision match, this does nothing.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path

_DESCRIPTIONS = "torchvision._meta_registrations"


def let_torchvision_import() -> None:
    """Leave the description out where it could not be made. `unet_caching` calls it when it is imported."""
    torch, torchvision = _version("torch"), _version("torchvision")
    if "+cu" in torchvision and "torchvision" not in sys.modules and not re.search(r"^(cuda|hip)\b.*'", torch, re.M):
        sys.modules.setdefault(_DESCRIPTIONS, types.ModuleType(_DESCRIPTIONS))


def _version(package: str) -> str:
    """What a package says of its version, without importing it: PyTorch takes seconds."""
    found = importlib.util.find_spec(package)
    path = Path(found.origin or "").with_name("version.py") if found else Path("nowhere")
    return path.read_text() if path.is_file() else ""
