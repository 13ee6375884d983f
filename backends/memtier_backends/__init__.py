"""What memtier stores with: journal, segments, index."""
