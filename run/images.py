"""Read the images of sample folders."""

from pathlib import Path

import numpy as np
from PIL import Image

from unet_caching.errors import UserError, one_line

# What Pillow raises for a truncated or damaged PNG and for other files; SyntaxError for a damaged chunk.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_LARGEST = 1 << 26      # pixels that an image may claim to have: 8192 x 8192


def read_png(path: Path, shape: tuple[int, ...] | None = None, example: Path | None = None) -> np.ndarray:
    """Read an image: uint8 [height, width, 3]. shape: the shape that it must have, like the image `example`.

    Raises UserError for a file that is not an image, not 8-bit RGB, or of another shape.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: move it elsewhere")
    try:
        with Image.open(path) as image:
            if image.width * image.height > _LARGEST:
                raise UserError(f"{path} claims to have {image.width}x{image.height} pixels: delete it and sample it "
                                "again")
            if image.mode != "RGB":
                raise UserError(f"{path} has mode {image.mode}: expected 8-bit RGB")
            if any(";16" in str(tile[3]) for tile in image.tile):       # Pillow would drop the lower 8 bits
                raise UserError(f"{path} has 16 bits a channel: expected 8-bit RGB")
            pixels = np.asarray(image)
    except UNREADABLE as error:
        raise UserError(f"{path} is truncated or not an image ({one_line(error)}): "
                        "delete it and sample it again") from None
    if shape is not None and pixels.shape != shape:
        raise UserError(f"mixed sizes: {path} is {pixels.shape[1]}x{pixels.shape[0]}, "
                        f"{example} is {shape[1]}x{shape[0]}")
    return pixels
