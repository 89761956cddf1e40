"""The command of experiments/overview.py."""

from experiments.overview import main

if __name__ == "__main__":
    main()
