"""The command of lab/study/demo_short.py."""

from lab.study.demo_short import main

if __name__ == "__main__":
    main()
