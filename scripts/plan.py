"""The command of lab/study/plan.py."""

from lab.study.plan import main

if __name__ == "__main__":
    main()
