"""Sample images from a DDPM, with or without caching.

    python -m ddpm.sample --config configs/ddpm_emoji.yaml --interval 5 --seeds 0-255 --out samples/emoji_n5
    python -m ddpm.sample --config configs/ddpm_cifar10.yaml --interval 5 --out samples/cifar10_n5
"""

from ddpm.family import FAMILY
from run.image_model import sample_command

main = sample_command(FAMILY, __doc__)

if __name__ == "__main__":
    main()
