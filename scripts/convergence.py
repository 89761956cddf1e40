"""The command of experiments/convergence.py."""

from experiments.convergence import main

if __name__ == "__main__":
    main()
