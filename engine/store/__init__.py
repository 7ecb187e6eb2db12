"""Store: rows on disk in zarr, block by block, readable by mmap."""
