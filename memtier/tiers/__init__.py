"""One file a tier: what a session owns of it, and what `inspect` reads from it."""
