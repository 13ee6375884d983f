"""What is done to a session on disk while no model reads it: copies, checkpoints, forgetting, moving, mending."""
