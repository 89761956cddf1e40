"""The command of lab/study/scale_shift_study.py."""

from lab.study.scale_shift_study import main

if __name__ == "__main__":
    main()
