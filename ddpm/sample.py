"""Sample images from a DDPM, with or without caching.

    python -m ddpm.sample --config configs/ddpm_emoji.yaml --interval 5 --seeds 0-255 --out samples/emoji_n5
    python -m ddpm.sample --config configs/ddpm_cifar10.yaml --interval 5 --out samples/cifar10_n5

Defaults are the paper's settings for the model. One image per seed, the same for any batch size or number of
processes; stop it whenever you like, the same command fills in what is missing. Several processes share the seeds as
they come, under torchrun or as the same command several times. SIGUSR1 and SIGTERM stop it after its batch, with 75.
"""

from ddpm.family import FAMILY
from run.cli import command
from run.image_model import sample_command


@command
def main() -> None:
    sample_command(FAMILY, __doc__)


if __name__ == "__main__":
    main()
