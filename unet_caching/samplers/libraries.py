"""Makes torchvision importable beside a CPU-only PyTorch, for the libraries that import it: transformers, open_clip...

Package registries carry one torchvision wheel, built for CUDA. Beside a CPU-only torch its compiled operators do not
load, and its import then fails where it describes them. Nothing here needs those operators (they are for detection),
so the description is left out. Where torch and torchvision match, this does nothing.
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch

_DESCRIPTIONS = "torchvision._meta_registrations"


def let_torchvision_import() -> None:
    """Leave the description out where it could not be made. Call it before anything imports torchvision."""
    if torch.version.cuda is not None or torch.version.hip is not None or "torchvision" in sys.modules:
        return
    found = importlib.util.find_spec("torchvision")
    if found is not None and found.origin and "+cu" in Path(found.origin).with_name("version.py").read_text():
        sys.modules[_DESCRIPTIONS] = types.ModuleType(_DESCRIPTIONS)
