"""Floor 1: series from files and frames, their store, splits, windows and partitions."""
