"""The command of lab/study/scale.py."""

from lab.study.scale import main

if __name__ == "__main__":
    main()
