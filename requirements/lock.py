"""Write lock.txt, the exact versions that `make` installs, from the packages of a fresh environment: `make lock`.

    pip list --format json | python requirements/lock.py > requirements/lock.txt

Needs nothing but Python's own library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping

HEADER = """\
# The exact versions that `make demo`, `make test`, `make check` and .ci/run install, as pip constraints.
# Written by `make lock`; edit pyproject.toml instead. Without a local version (+cpu): any build of a version will do.
# torch's own requirements (NVIDIA's packages, Triton) are not here: torch names their versions, per platform.
"""
# Installed by Python itself, or required by one build of torch in versions that it pins.
_NOT_OURS = ("pip", "atesd", "triton", "nvidia-", "cuda-")


def lock_text(packages: Iterable[Mapping[str, str]]) -> str:
    """Constraints for these packages (`name`, `version`), in the order of names."""
    pins = {p["name"].lower().replace("_", "-"): p["version"].partition("+")[0] for p in packages}
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins) if not _is_left_out(name)]
    return HEADER + "".join(lines)


def _is_left_out(name: str) -> bool:
    return any(name.startswith(word) if word.endswith("-") else name == word for word in _NOT_OURS)


if __name__ == "__main__":
    sys.stdout.write(lock_text(json.load(sys.stdin)))
