"""`python -m atesd.cli` is `atesd`."""

from atesd.cli import main

main()
