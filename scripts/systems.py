"""The command of experiments/systems.py."""

from experiments.systems import main

if __name__ == "__main__":
    main()
