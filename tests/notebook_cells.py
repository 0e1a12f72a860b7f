"""Run the code cells of a notebook in order, without Jupyter; `python tests/notebook_cells.py FILE` stores outputs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell: what it prints, and the figure that it ends in, if its last name is `figure`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in code_cells(notebook):
        said = io.StringIO()
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(said):
            exec(compile(source, "<cell>", "exec"), names)
        found: list[dict[str, Any]] = []
        if said.getvalue():
            found.append({"output_type": "stream", "name": "stdout", "text": said.getvalue().splitlines(keepends=True)})
        if source.splitlines()[-1] == "figure":
            found.append(picture(names["figure"]))
        outputs.append(found)
    return outputs


def picture(figure: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    return {"output_type": "display_data", "metadata": {}, "data": data}


if __name__ == "__main__":
    mpl.use("agg")
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text("utf-8"))
    for count, (cell, outputs) in enumerate(zip(code_cells(notebook), run_cells(notebook), strict=True), start=1):
        cell |= {"outputs": outputs, "execution_count": count}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
