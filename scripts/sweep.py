"""The command of experiments/sweep.py."""

from experiments.sweep import main

if __name__ == "__main__":
    main()
