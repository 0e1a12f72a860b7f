"""A sweep as Ray tasks, each an ordinary `atesd train`: Ray starts them where there is room, and does nothing else.

    atesd sweep PLAN --out /shared/sweep --print-commands > commands.txt
    python examples/sweep_ray.py commands.txt --gpus 1                        # on the cluster that `ray start` made
    python examples/sweep_ray.py commands.txt --local 2                       # two at a time on this machine

Ray may live in an environment of its own: `atesd` must be on the PATH of its workers, the folders on a file system that
all of them share. A task that was cut goes on from its checkpoint; `--print-commands` leaves out what is finished.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ray


@ray.remote(max_retries=3)  # of a worker that is lost; a run that fails says why and is not repeated
def train(line: str) -> tuple[str, int, str]:
    """Run one command; its line, exit code and last words."""
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return line, done.returncode, said[-1] if said else ""


def stages(text: str) -> Iterator[list[str]]:
    """The commands between the lines that say to wait."""
    for part in text.split("# wait here"):
        yield [line for line in part.splitlines() if line.startswith("atesd ")]


def main() -> int:
    """Stage by stage; 1 if a run has failed, and then no later stage begins, since it would read that run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", type=Path, help="what atesd sweep --print-commands wrote")
    parser.add_argument("--gpus", type=float, default=0, help="of each run")
    parser.add_argument("--cpus", type=float, default=1, help="of each run")
    parser.add_argument("--local", type=int, help="a Ray of its own on this machine, with so many CPUs")
    asked = parser.parse_args()
    if asked.local is None:
        ray.init(address="auto")
    else:
        ray.init(num_cpus=asked.local, include_dashboard=False)
    for lines in stages(asked.commands.read_text("utf-8")):
        left = [train.options(num_cpus=asked.cpus, num_gpus=asked.gpus).remote(line) for line in lines]
        failed = 0
        while left:
            ready, left = ray.wait(left)
            for line, code, said in ray.get(ready):
                failed += code != 0
                print(f"exit {code}: {line}\n    {said}", flush=True)
        if failed:
            print(f"{failed} of {len(lines)} runs failed; print the commands again for what is left", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
