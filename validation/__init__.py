"""Studies that validate instruments of the laboratory; not part of the package."""
