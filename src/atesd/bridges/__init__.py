"""The controller inside trainers that people already run: one file per trainer, what all share in `core` and `log`."""
