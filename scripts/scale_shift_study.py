"""The command of experiments/scale_shift_study.py."""

from experiments.scale_shift_study import main

if __name__ == "__main__":
    main()
