"""The command of experiments/demo.py."""

from experiments.demo import main

if __name__ == "__main__":
    main()
