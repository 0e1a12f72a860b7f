"""Average@k on held-out problems and the controller's probes."""
