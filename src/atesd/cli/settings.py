"""The resolved config as YAML that explains itself."""

from __future__ import annotations

from atesd.config import Config, describe_settings, yaml_value


def annotated_yaml(config: Config) -> str:
    """Every setting that acts, with unit, origin, and its default where it differs. Loads again to an equal config."""
    lines: list[str] = []
    opened: list[str] = []
    for setting in describe_settings(config):
        *groups, leaf = setting.path.split(".")
        for depth, group in enumerate(groups):
            if opened[: depth + 1] != groups[: depth + 1]:
                lines += ["", f"{group}:"] if depth == 0 else [f"{'  ' * depth}{group}:"]
                opened = groups[: depth + 1]
        words = setting.description
        origin = f"{words}; default {yaml_value(setting.default)}" if setting.changed else words
        lines.append(f"{'  ' * len(groups)}{leaf}: {yaml_value(setting.value)}  # {' '.join(origin.split())}")
    return "\n".join(lines[1:]) + "\n"
