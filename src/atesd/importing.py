"""What a user names as module:function or FILE.py:function: the maker of an exposure, a checker, a listener ..."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from atesd.errors import ConfigError

ALLOWED = "module:function or FILE.py:function"
_SUFFIX = ".py"


def is_named(word: str) -> bool:
    """Whether a word names a function, and is none of the words that a setting has of its own."""
    module, colon, function = word.rpartition(":")
    return bool(colon and module and all(part.isidentifier() for part in function.split(".")))


def named_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that `setting` names. Importing runs its module. Raises `ConfigError` if it cannot be had."""
    module, _, function = name.rpartition(":")
    if not is_named(name):
        raise ConfigError(f"{setting}: {name!r} is not allowed; expected {ALLOWED}")
    try:
        loaded = _file(Path(module)) if module.endswith(_SUFFIX) else importlib.import_module(module)
    except (ImportError, FileNotFoundError) as error:
        raise ConfigError(
            f"{setting}: {name} cannot be imported ({error}); install it, name its folder in PYTHONPATH, or name the "
            "file: FILE.py:function"
        ) from error
    except (Exception, SystemExit) as error:  # of whatever kind: the module is the user's
        raise ConfigError(f"{setting}: {name} cannot be imported: {cause(error)}") from error
    try:
        found = reduce(getattr, function.split("."), loaded)
    except AttributeError:
        raise ConfigError(
            f"{setting}: {name} cannot be imported: there is no '{function}' in {getattr(loaded, '__file__', module)}"
        ) from None
    if not callable(found):
        raise ConfigError(f"{setting}: {name} is no function but {type(found).__name__} {found!r:.60}")
    return found


def made_by(name: str, setting: str, fix: str, arguments: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """What the function that `setting` names makes of its arguments. Raises `ConfigError` with what it raises."""
    function = named_function(name, setting)
    try:
        return function(*arguments, **settings)
    except ConfigError:
        raise
    except Exception as error:  # of whatever kind: the function is the user's
        given = f" of {', '.join(f'{key}={value!r}' for key, value in settings.items())}" if settings else ""
        raise ConfigError(f"{setting}: {name} made nothing{given}: {cause(error)}; {fix}") from error


def function_made_by(name: str, setting: str, settings: Mapping[str, Any], of: str) -> Callable[..., Any]:
    """The function that a factory gives, to be called with `of`. Raises `ConfigError` where it gives none."""
    fix = f"it is called with the settings of {setting}_settings and gives a function of ({of})"
    made = made_by(name, setting, fix, (), settings)
    if not callable(made):
        raise ConfigError(f"{setting}: {name} made {type(made).__name__} {made!r:.60}, which cannot be called; {fix}")
    return made  # type: ignore[no-any-return]


def require_offers(made: object, protocol: type, maker: str, fix: str) -> None:
    """Raise `ConfigError` that names the maker, what it made lacks of a protocol, and the fix."""
    missing = [part for part in vars(protocol) if not part.startswith("_") and not hasattr(made, part)]
    if missing:
        raise ConfigError(f"{maker} made a {type(made).__name__} without {', '.join(missing)}; {fix}")


def beside(name: str, folder: Path) -> str:
    """The name with the path of its file, where the file lies in `folder`, that of a recipe; else as it is.

    So `mine:make` beside the recipe is found from anywhere, whatever Python's own path holds.
    """
    module, _, function = name.rpartition(":")
    if not is_named(name) or (module.endswith(_SUFFIX) and Path(module).is_file()):
        return name
    file = folder / (module if module.endswith(_SUFFIX) else f"{module.replace('.', '/')}{_SUFFIX}")
    return f"{file}:{function}" if file.is_file() else name


def sha256_of(name: str) -> str | None:
    """SHA-256 (hexadecimal) of the file that holds a named function; None if there is none to read."""
    module = name.rpartition(":")[0]
    try:
        spec = None if module.endswith(_SUFFIX) else importlib.util.find_spec(module)
        path = module if module.endswith(_SUFFIX) else (spec and spec.origin) or ""
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (ImportError, ValueError, OSError):
        return None


def cause(error: BaseException) -> str:
    """An error of code that is not ours: its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__


def _file(path: Path) -> ModuleType:
    """The module in a file, run once. Its name is made of the whole path, so that it hides no other module."""
    path = path.resolve()
    name = f"atesd_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
