"""Sample images from a class-conditional latent diffusion model, with or without caching.

    python -m ldm.sample --config configs/ldm_emoji.yaml --interval 10 --seeds 0-99 --out samples/ldm_emoji_n10
    python -m ldm.sample --config configs/ldm_cin256.yaml --interval 10 --out samples/cin256_n10

Defaults are the paper's settings for the model. One image per seed, label included, the same for any batch size or
number of processes; stop it whenever you like, the same command fills in what is missing. Several processes share the
seeds as they come, under torchrun or as the same command several times. SIGUSR1 and SIGTERM stop it after its batch,
with 75. OUT/images.csv lists seed, label and class name.
"""

from ldm.family import FAMILY
from run.cli import command
from run.image_model import sample_command


@command
def main() -> None:
    sample_command(FAMILY, __doc__)


if __name__ == "__main__":
    main()
