"""Make torchvision importable beside a CPU-only PyTorch, for libraries that import it, like diffusers and transformers.

Package registries have one torchvision wheel, built for CUDA. Beside a CPU-only torch its compiled operators do not
load, so its import fails in the module that describes them. Nothing here needs these operators, which are for
detection, so that module is replaced by an empty one. If torch and torchvision match, this does nothing.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path

_DESCRIPTIONS = "torchvision._meta_registrations"


def let_torchvision_import() -> None:
    """Replace the module if it would fail. `unet_caching` calls this when it is imported."""
    torch, torchvision = _version("torch"), _version("torchvision")
    if "+cu" in torchvision and "torchvision" not in sys.modules and not re.search(r"^(cuda|hip)\b.*'", torch, re.M):
        sys.modules.setdefault(_DESCRIPTIONS, types.ModuleType(_DESCRIPTIONS))


def _version(package: str) -> str:
    """The text of a package's version.py, without importing the package: PyTorch takes seconds."""
    found = importlib.util.find_spec(package)
    path = Path(found.origin or "").with_name("version.py") if found else Path("nowhere")
    return path.read_text() if path.is_file() else ""
