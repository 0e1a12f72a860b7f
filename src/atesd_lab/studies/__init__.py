"""One module per study: the demo, the bad teacher."""
