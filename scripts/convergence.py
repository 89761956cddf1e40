"""The command of lab/study/convergence.py."""

from lab.study.convergence import main

if __name__ == "__main__":
    main()
