"""Sample images from Stable Diffusion, one for each prompt of a file, with or without caching.

    python -m stable_diffusion.sample --config configs/sd_v15.yaml --prompts parti.tsv --interval 5 --out samples/n5
    python -m stable_diffusion.sample --config configs/sd_emoji.yaml --prompt "cat face" --seeds 0-7 --out samples/cat
    python -m stable_diffusion.sample --config configs/sdxl.yaml --model DIR --prompt "a corgi" --out samples/corgi

Prompts come from .txt (one per line), .csv, .tsv or .json, COCO's captions included (run/prompts.py). Image i has
prompt i and seed i; OUT/prompts.csv lists both. No file is downloaded.
"""

from run.image_model import sample_command
from stable_diffusion.family import FAMILY

main = sample_command(FAMILY, __doc__)

if __name__ == "__main__":
    main()
