"""One short module per table, figure or claim."""
