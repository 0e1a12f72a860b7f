"""matplotlib's SVG made fit for a page: inline, no ids that collide, legal under a policy that forbids styles."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from atesd.text import visible

INK = "#24292f"  # axes and text; becomes the colour of the surrounding page
_DROPPED_STYLES = frozenset({"font-family"})  # the page's font
_LONG_DECIMAL = re.compile(r"(\d+\.\d{2})\d+")  # positions are in points; a matrix is not
_REFERENCE = re.compile(r"(?:url\()?#([\w.-]+)\)?")


def inline_svg(figure: Figure, key: str, description: str) -> str:
    """One `<svg>` element that scales with its box, named `description` for those who do not see it.

    `key` must differ between figures of one page: it prefixes the ids of clip paths and markers. Styles become
    presentation attributes, which a content security policy without 'unsafe-inline' allows. The same figure gives the
    same bytes.
    """
    key = re.sub(r"[^A-Za-z0-9-]", "-", key)
    root = _strip(ElementTree.fromstring(_render(figure, key)))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": visible(description), "stroke-linejoin": "round"}
    _rename_ids(root, key)
    return ElementTree.tostring(root, encoding="unicode")


def _render(figure: Figure, key: str) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _strip(element: ElementTree.Element) -> ElementTree.Element:
    """Drop namespaces, metadata, style sheets, bare groups and needless digits; styles become attributes."""
    element.tag = _local(element.tag)
    attributes: dict[str, str] = {}
    for name, value in element.attrib.items():
        if name == "style":
            attributes |= _presentation(value)
        else:
            attributes[_local(name)] = value if name.endswith("href") or "matrix" in value else _shorten(value)
    element.attrib = attributes
    children = [_strip(child) for child in element if _local(child.tag) not in ("metadata", "style")]
    for child in list(element):
        element.remove(child)
    for child in children:
        drawn = len(child) or child.tag not in ("g", "defs")
        bare_group = child.tag == "g" and set(child.attrib) <= {"id"}
        element.extend(list(child) if bare_group else [child] if drawn else [])
        child.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None
    return element


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _presentation(style: str) -> dict[str, str]:
    declarations = [part.partition(":") for part in style.split(";") if part.strip()]
    pairs = {name.strip(): value.strip() for name, _, value in declarations}
    return {
        name: "currentColor" if value == INK else value for name, value in pairs.items() if name not in _DROPPED_STYLES
    }


def _shorten(value: str) -> str:
    return _LONG_DECIMAL.sub(r"\1", " ".join(value.split()))


def _rename_ids(root: ElementTree.Element, key: str) -> None:
    """Prefix the ids that something refers to; forget the others."""
    names = ("href", "clip-path", "mask", "fill")
    used = {
        match[1]
        for element in root.iter()
        for name in names
        if (match := _REFERENCE.fullmatch(element.get(name, ""))) and not element.get(name, "").startswith("data:")
    }
    known = {element.get("id") for element in root.iter()} & used
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in known:
            element.set("id", f"{key}-{own}")
        for name in names:
            match = _REFERENCE.fullmatch(element.get(name, ""))
            if match and match[1] in known:
                element.set(name, element.get(name, "").replace(f"#{match[1]}", f"#{key}-{match[1]}"))
