"""The middle rung: word problems of reasoning-gym, and a small language model that is taught them here."""
