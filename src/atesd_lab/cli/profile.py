"""Profile a recipe, write the files, and print, for `atesd profile`."""

from __future__ import annotations

import json
from pathlib import Path

from atesd.cli.options import say
from atesd.config import Config
from atesd.errors import ConfigError
from atesd_lab.profile.report import profile_json, profile_text, run_profile, write_profile


def print_profile(config: Config, name: str, problems: int | None, out: Path, *, as_json: bool = False) -> None:
    """Profile, write all files into `out`, and print the tables, or JSON. Raises `ConfigError` if `out` cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot make this folder: {error.strerror}; choose another") from None
    profile = run_profile(config, problems, lambda text: say(text, err=True))
    paths = write_profile(profile, config, name, out)
    if as_json:
        say(json.dumps(profile_json(profile), indent=1, allow_nan=False))
        return
    say(profile_text(profile, name), nl=False)
    say(f"written: {', '.join(str(path) for path in paths)}")
    say(f"train it: atesd train {out / 'recipe.yaml'} --out RUN_FOLDER")
