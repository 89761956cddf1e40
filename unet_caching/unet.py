"""What the papers' U-Nets have in common: blocks in levels that form a nest."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from unet_caching.nest import Block, Upsample


class NestedUNet(nn.Module):
    """A U-Net of input blocks, a middle block and output blocks, called `unet(x, t, *context, cache=cache)`."""
    num_branches: int       # the number of skip connections; a branch is one of them, 0..num_branches - 1

    def embedding(self, t: Tensor) -> Tensor:
        """The embedding of the timestep: [batch] -> [batch, channels]."""
        raise NotImplementedError

    def add_blocks(self, conv_in: nn.Conv2d, widths: Sequence[int], num_res_blocks: int,
                   block: Callable[[int, int, int], Block], downsample: Callable[[int], nn.Module],
                   middle: Callable[[int], Block]) -> None:
        """Make input_blocks, middle_block and output_blocks.

        widths: channels of each level. block(in_channels, out_channels, level), downsample(channels), middle(channels)
        make their parts.
        """
        # Encoder: a convolution, then for each level its ResNet blocks and a downsampling; each output is a skip.
        channels, skips = conv_in.out_channels, [conv_in.out_channels]
        self.input_blocks = nn.ModuleList([Block(conv_in)])
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(block(channels, width, level))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(downsample(channels)))
                skips.append(channels)
        self.num_branches = len(skips)

        self.middle_block = middle(channels)

        # Decoder: one block for each skip, the innermost first; the last block of a level upsamples.
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                added = block(channels + skips.pop(), width, level)
                channels = width
                if level > 0 and i == num_res_blocks:
                    added.append(Upsample(channels))
                self.output_blocks.append(added)
        name_residuals(self)


def name_residuals(unet: nn.Module) -> None:
    """Set the `key` of every module whose output a cache may keep, which has a `kind`, to its name in the U-Net."""
    for name, module in unet.named_modules():
        if hasattr(module, "kind"):
            module.key = name
