"""The resolved config as YAML that explains itself."""

from __future__ import annotations

from atesd.config import Config, describe_settings, yaml_value


def annotated_yaml(config: Config) -> str:
    """Every setting in force with unit and origin, and its default where it differs. Loads again to an equal config."""
    defaults = {path: value for path, value, _ in describe_settings(Config())}
    lines: list[str] = []
    opened: list[str] = []
    for path, value, words in describe_settings(config):
        *groups, leaf = path.split(".")
        for depth, group in enumerate(groups):
            if opened[: depth + 1] != groups[: depth + 1]:
                lines += ["", f"{group}:"] if depth == 0 else [f"{'  ' * depth}{group}:"]
                opened = groups[: depth + 1]
        changed = path in defaults and value != defaults[path]
        origin = f"{words}; default {yaml_value(defaults[path])}" if changed else words
        lines.append(f"{'  ' * len(groups)}{leaf}: {yaml_value(value)}  # {' '.join(origin.split())}")
    return "\n".join(lines[1:]) + "\n"
