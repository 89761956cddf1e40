"""The command of experiments/block_caching_demo.py."""

from experiments.block_caching_demo import main

if __name__ == "__main__":
    main()
