"""The command of experiments/plan.py."""

from experiments.plan import main

if __name__ == "__main__":
    main()
