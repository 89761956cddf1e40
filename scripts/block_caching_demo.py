"""The command of lab/study/block_caching_demo.py."""

from lab.study.block_caching_demo import main

if __name__ == "__main__":
    main()
