"""The command of experiments/scale.py."""

from experiments.scale import main

if __name__ == "__main__":
    main()
