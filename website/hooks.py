"""What `make site` adds to docs/: the README as the first page, the notebook, the reference, and the files linked to.

mkdocs calls the functions whose names begin with `on_` (mkdocs.yml names this file). Nothing is written into docs/.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the repository that lie outside docs/, by their place on the site."""
NOTEBOOK = "first-run.ipynb"
REFERENCE = {
    "training": ("Train, resume, evaluate", ("atesd.session", "atesd.build", "atesd.runs")),
    "settings": ("Settings", ("atesd.config", "atesd.component")),
    "exposure": (
        "Exposures and credit",
        ("atesd.control.interface", "atesd.control.learned", "atesd.control.custom", "atesd.control.credit"),
    ),
    "mathematics": (
        "Mathematics",
        (
            "atesd.maths.divergence",
            "atesd.maths.divergences",
            "atesd.maths.beta",
            "atesd.maths.credit",
            "atesd.maths.alignment",
            "atesd.maths.advantages",
            "atesd.maths.keyed",
            "atesd.maths.statistics",
        ),
    ),
    "data": ("Data", ("atesd.data.sources", "atesd.data.segments", "atesd.data.views")),
    "bridges": ("Inside other trainers", ("atesd.bridges.core", "atesd.bridges.log")),
    "laboratory": (
        "The laboratory",
        ("atesd_lab.report.page", "atesd_lab.report.honest", "atesd_lab.stats.contrast", "atesd_lab.sweep.plan"),
    ),
    "errors": ("Records and errors", ("atesd.records", "atesd.rows", "atesd.errors")),
}
"""Pages of the reference: a title, and the modules whose docstrings it shows."""
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".txt": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a page for every file of the repository that a page links to."""
    for uri, path in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text("utf-8")))
    notebook = files.get_file_from_path(NOTEBOOK)
    if notebook is not None:
        files.remove(notebook)
        files.append(File.generated(config, "first-run.md", content=notebook_page(ROOT / "docs" / NOTEBOOK)))
    for name, (title, modules) in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=reference_page(title, modules)))
    for path in sorted({path for page in files.documentation_pages() for path in linked(page)}):
        if site_uri(path) == f"files/{path}.md":
            files.append(File.generated(config, site_uri(path), content=file_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Let the links of a page lead to where their targets are on the site."""
    here = repository_path(page.file.src_uri)
    return outside_code(markdown, lambda text: LINK.sub(lambda link: moved(link, here, page.file.src_uri), text))


def moved(link: re.Match[str], here: str, uri: str) -> str:
    """A Markdown link from the file `here` of the repository as one from the page `uri` of the site."""
    target = resolved(here, link[2])
    if target is None:
        return link[0]
    return f"{link[1]}{posixpath.relpath(site_uri(target), posixpath.dirname(uri) or '.')}{link[3]}"


def resolved(here: str, target: str) -> str | None:
    """The path in the repository that a link means; None where it is no file of ours."""
    if target.startswith(("http:", "https:", "mailto:", "data:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    return path if (ROOT / path).is_file() else None


def linked(file: File) -> set[str]:
    """The files of the repository that a page links to."""
    here = repository_path(file.src_uri)
    targets = (resolved(here, link[2]) for link in LINK.finditer(FENCE.sub("", file.content_string)))
    return {target for target in targets if target is not None}


def repository_path(uri: str) -> str:
    """Where a page of the site comes from; its links are relative to that."""
    if uri.startswith("files/"):
        return uri.removeprefix("files/").removesuffix(".md")
    return PAGES.get(uri, f"docs/{uri}")


def site_uri(path: str) -> str:
    """Where a file of the repository is on the site."""
    for uri, source in PAGES.items():
        if source == path:
            return uri
    if path == f"docs/{NOTEBOOK}":
        return "first-run.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}.md"


def file_page(path: str) -> str:
    """A file of the repository as a page: Markdown as it is, all else as code."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(os.path.splitext(path)[1], "text")
    return f"# {path}\n\n```{language}\n{text.rstrip()}\n```\n"


def reference_page(title: str, modules: tuple[str, ...]) -> str:
    """A page that mkdocstrings fills from docstrings."""
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that it was stored with."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown for output in cell.get("outputs", []) if (shown := output_text(output))]
    return "\n\n".join(parts) + "\n"


def output_text(output: dict[str, Any]) -> str:
    """One stored output: a picture, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def outside_code(markdown: str, change: Any) -> str:
    """Change a text but for its fenced code."""
    parts, place = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[place : fence.start()]), fence[0]]
        place = fence.end()
    return "".join([*parts, change(markdown[place:])])
