"""What README, CONTRIBUTING and docs/ name exists: files, modules, settings, commands with their options, links."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from atesd.cli import app
from atesd.component import choice_in, group_in
from atesd.config import Config
from atesd_lab.cli.commands import laboratory
from test_layers import ROWS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"evaluation/grader.py", "prime_math/grader.py"}  # of other projects
SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^ *```.*?^ *```|(?<=\n\n)(?:    [^\n]*\n)+", re.DOTALL | re.MULTILINE)
FORMER = re.compile(r"^\| before \|.*?\n\n", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HOMES = [ROOT, ROOT / "src", ROOT / "src/atesd", ROOT / "src/atesd_lab"]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_of(page: Path) -> list[str]:
    """The code spans and the code blocks of a page."""
    text = FORMER.sub(without_first_column, page.read_text("utf-8"))
    return [*BLOCK.findall(text), *SPAN.findall(BLOCK.sub("", text))]


def without_first_column(table: re.Match[str]) -> str:
    """A table of old and new names without the old ones."""
    return re.sub(r"^\|[^|]*\|", "|", table[0], flags=re.MULTILINE)


def in_code(page: Path, pattern: str) -> set[str]:
    return {found for code in code_of(page) for found in re.findall(pattern, code)}


@every_page
def test_a_file_that_is_named_exists(page: Path):
    named = in_code(page, r"(?<![\w./-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|txt|cff)\b")
    named = {name for name in named - ELSEWHERE if not name.startswith("runs/") and "NAME" not in name}
    assert {name for name in named if not any((home / name).exists() for home in HOMES)} == set()


@every_page
def test_a_folder_of_the_tree_that_is_named_exists(page: Path):
    named = in_code(
        page, r"(?<![\w./-])(?:(?:src|tests|docs|benchmarks|validation|atesd|atesd_lab)/)(?:\w+/)*(?![\w*.-])"
    )
    assert {name for name in named if not any((home / name).is_dir() for home in HOMES)} == set()


@every_page
def test_a_dotted_name_can_be_imported(page: Path):
    names = in_code(page, r"(?<![\w./@-])atesd(?:_lab)?(?:\.[A-Za-z_]\w*)+")
    assert {name for name in names if not is_importable(name)} == set()


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is not None and not error.name.startswith("atesd"):
                return True  # it is there, but a bridge imports the trainer that it is for
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@every_page
def test_a_module_that_is_run_exists(page: Path):
    modules = in_code(page, r"-m ((?:atesd|atesd_lab|benchmarks|validation)\b[\w.]*)")
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()


@every_page
def test_a_setting_that_is_named_exists(page: Path):
    known = {*paths_of(Config)}
    groups = "|".join(Config.model_fields)
    named = in_code(page, rf"(?<![\w./-])((?:{groups})(?:\.[a-z_0-9]+)+)(?=[=:,)\s]|$)")
    free = ("exposure.factory_settings.", "model.student_template.", "model.teacher_template.")  # keys of your own
    named = {name for name in named if not name.startswith(free) and not name.endswith(".md")}
    assert {name for name in named - known if not is_importable(f"atesd.{name}")} == set()


def paths_of(component: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting and of every group, of all kinds."""
    for name in component.model_fields:
        yield prefix + name
        group, choice = group_in(component, name), choice_in(component, name)
        for inner in [*([group] if group else []), *(choice[1].values() if choice else [])]:
            yield from paths_of(inner, f"{prefix}{name}.")


def verbs() -> dict[str, Any]:
    """The commands of both packages, by name."""
    return {**commands_of(app), **commands_of(laboratory)}


def commands_of(group: typer.Typer) -> dict[str, Any]:
    return dict(typer.main.get_group(group).commands)


@every_page
def test_a_command_exists_with_its_options(page: Path):
    lines = in_code(page, r"(?:^|[\n$ ])(?<!from )atesd ([a-z][^\n#`|]*)")
    assert {line for line in lines if not is_command(line.split())} == set()


def is_command(words: list[str]) -> bool:
    """Whether these words name a verb, and its options only."""
    known, command = verbs(), None
    while words and known:
        command = known.get(words.pop(0))
        known = getattr(command, "commands", {})
    if command is None:
        return False
    options = {name for parameter in command.params for name in parameter.opts}
    return {word.partition("=")[0] for word in words if re.match("--[a-z]", word)} <= options | {"--help"}


@every_page
def test_a_target_of_make_exists(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = in_code(page, r"(?:^|\n)make ([a-z][\w-]*(?: [a-z][\w-]*)*)")
    assert {word for words in named for word in words.split()} - targets == set()


@every_page
def test_a_link_leads_to_a_file_and_to_a_heading(page: Path):
    for link in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if link.startswith(("http", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_rooms_stand_in_the_order_of_the_layers():
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    for package, rows in ROWS.items():
        table = text.partition(f"| `src/{package}/` |")[2].partition("\n\n")[0]
        rooms = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
        assert rooms == rows


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_a_file_that_is_named_exists, "`train/gone.py`"),
        (test_a_folder_of_the_tree_that_is_named_exists, "`src/gone/`"),
        (test_a_dotted_name_can_be_imported, "`atesd.session.gone`"),
        (test_a_module_that_is_run_exists, "```\npython -m atesd_lab.gone\n```"),
        (test_a_setting_that_is_named_exists, "\n\n    atesd train micro --set credit.gone=1\n"),
        (test_a_command_exists_with_its_options, "\n\n    atesd gone micro\n"),
        (test_a_command_exists_with_its_options, "`atesd train micro --gone`"),
        (test_a_target_of_make_exists, "`make gone`"),
        (test_a_link_leads_to_a_file_and_to_a_heading, "[gone](gone.md)"),
        (test_a_link_leads_to_a_file_and_to_a_heading, "# Here\n\n[gone](#there)"),
    ],
)
def test_a_name_of_nothing_is_found(check: Callable[[Path], None], text: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    with pytest.raises(AssertionError):
        check(page)
