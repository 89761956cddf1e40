"""The command of lab/study/sweep.py."""

from lab.study.sweep import main

if __name__ == "__main__":
    main()
