"""The command of planning/block_caching.py."""

from planning.block_caching import main

if __name__ == "__main__":
    main()
