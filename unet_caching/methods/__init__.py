"""The caching methods, in a file each."""
