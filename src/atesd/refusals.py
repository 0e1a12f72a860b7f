"""The disk: what it refuses, told as an error of ours (which file, why not, the fix), and deleting past no link."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atesd.errors import AtesdError, RunError

_FIXES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space, then give the same command again",
    (errno.EACCES, errno.EPERM, errno.EROFS): "change its permissions, or choose another folder",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP): "restore what was moved or replaced, or choose another "
    "folder",
}


@contextmanager
def refusals_told(path: Path, doing: str, kind: type[AtesdError] = RunError) -> Iterator[None]:
    """Turn an `OSError` inside into a `kind` that names `path`; `doing` completes "cannot be ..."."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: cannot be {doing}: {reason(error)}; {_fix(error)}") from error


def reason(error: OSError) -> str:
    """Why, in the system's words."""
    return error.strerror or str(error) or type(error).__name__


def _fix(error: OSError) -> str:
    fixes = (fix for numbers, fix in _FIXES.items() if error.errno in numbers)
    return next(fixes, "check the disk, then give the same command again")


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Delete what bears a name, if anything does. A link is unlinked, whatever it leads to."""
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A name beside `folder` to write under, which takes its place at the end, or is gone again if that fails.

    Only then is what had the name removed: nothing is written through a link, and nothing half-written bears the name.
    """
    part = folder.with_name(f".{folder.name}-part")
    remove(part)
    try:
        yield part
        remove(folder)
        part.rename(folder)
    finally:
        with suppress(OSError):  # a disk that refuses this too has said why already
            remove(part)
