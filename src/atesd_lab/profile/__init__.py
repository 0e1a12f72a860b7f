"""Before training: what a teacher would be worth at each reveal ratio."""
