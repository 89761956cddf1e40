"""The command of lab/fit/block_caching.py."""

from lab.fit.block_caching import main

if __name__ == "__main__":
    main()
