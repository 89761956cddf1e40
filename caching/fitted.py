"""Files of what was fitted to the runs of one model: they say which runs, and are refused by any other."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

# What of a run's settings a fitted file is made for. Guidance, prompts and number format may differ: it is measured
# over many images, and small changes of the trajectory move it little.
BOUND = ("model", "unet", "checkpoint_sha256", "sampler", "steps", "timesteps")


def bound(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's settings a file is made for: those under BOUND, and the U-Net's `fingerprint` where it is known.
    """
    return {key: run[key] for key in (*BOUND, "fingerprint") if key in BOUND or key in run}


def refuse_other_run(what: str, made_for: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a run of other settings than a file was made for; those not known yet may be left out.

    what: how the message begins, "the block schedule was made". made_for: the settings under BOUND, and more; a
    checkpoint_sha256 of None stands for any weights. Raises ValueError that says what differs.
    """
    differing = [key for key in made_for if key in settings and made_for[key] != settings[key]
                 and not (key == "checkpoint_sha256" and made_for[key] is None)]
    if differing:
        shown = ("unet differs" if key in ("unet", "fingerprint") else
                 f"{key} {made_for[key]} there, {settings[key]} here" for key in differing)
        raise ValueError(f"{what} for another run: {'; '.join(shown)}")


def fingerprint(unet: nn.Module, in_channels: int, context: int | None) -> str:
    """A digest of a U-Net's shape: equal in our layout and in diffusers', with or without adapters, and when quantised.

    It is of the widths of all normalisations, which nothing of that touches. in_channels: of the image or latents.
    context: channels of what cross-attention attends to; None without.
    """
    groups = Counter(module.num_channels for module in unet.modules() if isinstance(module, nn.GroupNorm))
    layers = Counter(module.normalized_shape[0] for module in unet.modules() if isinstance(module, nn.LayerNorm))
    content = [in_channels, context, sorted(groups.items()), sorted(layers.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
