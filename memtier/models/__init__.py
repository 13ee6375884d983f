"""Models that memtier defines."""
