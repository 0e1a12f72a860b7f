"""The site's plan, without the packages that build it: every page of docs/ is in it, and what it names exists."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLAN = (ROOT / "mkdocs.yml").read_text("utf-8")
HOOKS = ast.parse((ROOT / "website" / "hooks.py").read_text("utf-8"))


def constant(name: str) -> ast.expr:
    """The value of a constant of the hooks."""
    return next(
        node.value
        for node in HOOKS.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    )


def words(value: ast.expr) -> list[str]:
    return [node.value for node in ast.walk(value) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_page_of_docs_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/.-]+\.md)$", PLAN, re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - listed == set()
    generated = {"index.md", "first-run.md", "contributing.md", "changelog.md"}
    assert {page for page in listed - pages - generated if not page.startswith("reference/")} == set()


def test_every_module_of_the_reference_exists_and_every_page_of_it_is_listed():
    reference = constant("REFERENCE")
    assert isinstance(reference, ast.Dict)
    modules = [word for word in words(reference) if word.startswith("atesd")]
    assert len(modules) > 10
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    names = [key.value for key in reference.keys if isinstance(key, ast.Constant)]
    assert set(re.findall(r"reference/(\w+)\.md", PLAN)) == set(names)


def test_broken_links_fail_and_nothing_is_fetched_when_a_page_is_read():
    assert "strict: true" in PLAN
    assert "mkdocs build\n" in (ROOT / "Makefile").read_text("utf-8")  # --quiet would count no warning
    assert re.findall(r"^  (\w+): warn$", PLAN, re.MULTILINE) == [
        "omitted_files",
        "absolute_links",
        "unrecognized_links",
        "anchors",
    ]
    assert "font: false" in PLAN  # else a reader's browser asks Google
    assert "https://" not in PLAN


def test_every_package_of_the_site_has_one_version():
    lines = (ROOT / "requirements" / "site.txt").read_text("utf-8").splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
