"""Exposures: who decides how much of the reference the teacher sees. No model, no trainer."""
