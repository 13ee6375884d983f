"""What `memtier demo` and `memtier bench` run."""
