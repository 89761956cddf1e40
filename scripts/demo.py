"""The command of experiments/demo_short.py."""

from experiments.demo_short import main

if __name__ == "__main__":
    main()
