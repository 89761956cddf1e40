"""Sample images from a class-conditional latent diffusion model, with or without caching.

    python -m ldm.sample --config configs/ldm_emoji.yaml --interval 10 --seeds 0-99 --out samples/ldm_emoji_n10
    python -m ldm.sample --config configs/ldm_cin256.yaml --interval 10 --out samples/cin256_n10

An image's label also depends only on its seed. OUT/images.csv lists seed, label and class name.
"""

from ldm.family import FAMILY
from run.image_model import sample_command

main = sample_command(FAMILY, __doc__)

if __name__ == "__main__":
    main()
