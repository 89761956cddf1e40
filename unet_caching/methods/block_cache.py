"""Block Caching (arXiv 2312.03209): reuse single residuals, each on a schedule derived from how much it changes.

Instead of being reused as they are, they can be forecast (unet_caching/forecast.py), which is not of the paper.

The paper measures L1rel(i, t) = |C_i(t) - C_i(t - 1)|_1 / |C_i(t)|_1 of each block's residual C_i from step to step
and keeps a value until the sum of these changes since it was computed exceeds a threshold delta.
Steps count in the order in which they run, 0 at the highest noise level; the change of step t is that from step t - 1.
"""

from collections.abc import Iterable

from torch import nn

KINDS = ("transformer", "attention", "resnet", "all")


def residual_names(unet: nn.Module, kinds: str = "transformer") -> list[str]:
    """The residuals of a U-Net under which a cache knows them, in the order of its modules.

    kinds: 'transformer' (as in the paper: spatial transformers, DDPM's attention blocks), 'attention' (the self- and
    cross-attentions inside transformers alone), 'resnet' or 'all' (transformers and ResNet blocks).
    Raises ValueError for any other kind, or when the U-Net has none of it.
    """
    if kinds not in KINDS:
        raise ValueError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
    wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
    names = [name for name, module in unet.named_modules() if getattr(module, "kind", None) in wanted]
    if not names:
        raise ValueError(f"this U-Net has no {kinds} blocks that could be cached")
    return names


def outside(names: Iterable[str], num_branches: int, branch: int) -> list[str]:
    """Those of the residuals that run on a cached step of DeepCache at `branch`: in blocks 0..branch of either side."""
    def runs(name: str) -> bool:
        side, index, *_ = name.split(".")
        skip = {"input_blocks": int(index), "output_blocks": num_branches - 1 - int(index)}.get(side)
        return skip is not None and skip <= branch

    return [name for name in names if runs(name)]
