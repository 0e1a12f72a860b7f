"""atesd: adaptive teacher exposure for on-policy self-distillation (arXiv 2605.11458)."""

__version__ = "0.1.0"
