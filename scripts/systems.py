"""The command of lab/study/systems.py."""

from lab.study.systems import main

if __name__ == "__main__":
    main()
