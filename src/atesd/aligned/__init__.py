"""Our extension: a first-order look-ahead that says which exposure, and which tokens, would raise verified success."""
