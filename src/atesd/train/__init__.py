"""One update, the loop around it, and the checkpoints."""
