"""The recall suite: tasks, models of equal memory, the runs of a grid and what they say. See `memtier bench recall`."""
