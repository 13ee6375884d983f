"""memtier lets a language model remember: four tiers of memory, in constant device memory."""
