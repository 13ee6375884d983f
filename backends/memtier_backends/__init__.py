"""Storage for memtier: the journal, segment files and the index of a session, and the contracts they keep."""
