"""What a run will need before anything is loaded: bytes per device and seconds per update, by arithmetic alone."""
