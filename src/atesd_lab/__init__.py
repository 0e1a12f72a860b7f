"""The laboratory: reads run folders, and runs many of them. It imports `atesd`; `atesd` never imports it."""
