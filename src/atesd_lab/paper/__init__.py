"""The paper's tables and figures, one module each, from one grid of paired runs."""
