"""The down and up blocks of a U-Net: the nest runs their forwards layer by layer, and never calls them whole.

What is hung on such a container runs when the first of its parts that a step needs runs, and after the last one: the
hooks by which diffusers offloads groups of layers. What else would be around its forward is refused.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from unet_caching.errors import UserError


class Containers:
    """Enters a container before the first of its parts runs, and leaves it when a part of another one does."""

    def __init__(self, blocks: Iterable[nn.Module]):
        self.hooked = []
        for block in blocks:
            if "_diffusers_hook" in block.__dict__:
                self.hooked.append(block)
        self.inside: nn.Module | None = None

    def enter(self, block: nn.Module) -> None:
        """Parts of this block run from now on."""
        if not self.hooked or block is self.inside:
            return
        self.leave()
        if block in self.hooked:
            self.inside = block
            for hook in reversed(_hooks(block)):
                hook.pre_forward(block)

    def leave(self) -> None:
        """The last part of a block has run."""
        block, self.inside = self.inside, None
        if block is not None:
            for hook in _hooks(block):
                hook.post_forward(block, None)


def named_containers(unet: nn.Module, middle: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that the nest takes apart, by name; the middle one too where its residuals may be kept."""
    if middle:
        yield "mid_block", unet.get_submodule("mid_block")
    for side in ("down_blocks", "up_blocks"):
        for i, block in unet.get_submodule(side).named_children():
            yield f"{side}.{i}", block


def check_containers(unet: nn.Module, middle: bool = False) -> None:
    """Refuse what is around the forward of a container and would not run. Raises UserError."""
    for name, block in named_containers(unet, middle):
        inside = vars(block)
        own = getattr(inside.get("forward"), "__func__", None) is type(block).forward       # put back by a helper
        if ("forward" in inside and not own and not _hooks(block)) or "_hf_hook" in inside:
            raise UserError(f"pipe.unet.{name} has a forward of its own, which would not run: undo what put it there "
                            "(DeepCacheSDHelper's disable(), for instance)")
        if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
            raise UserError(f"pipe.unet.{name} has a forward hook, which would not run: hook the ResNet blocks and "
                            "transformers inside it")


def _hooks(block: nn.Module) -> list:
    """diffusers' hooks on a module, the innermost first."""
    registry = vars(block).get("_diffusers_hook")
    return [] if registry is None else [registry.hooks[name] for name in registry._hook_order]
