"""Tutorials from the first cell to the last.

    python docs/site/notebooks.py [NAME ...]    executes docs/tutorials/NAME.ipynb (all of them) and writes what they print

What is kept of a cell's output is what stands on the page: standard output, results, figures; progress and warnings of standard
error are not.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parents[1] / "tutorials"
SECONDS = 180  # of one cell, on a busy machine


def execute(path: Path, folder: Path) -> Any:
    """The notebook with its outputs, run in an empty folder.  Raises nbclient's CellExecutionError with the failing cell."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # cells run `unbraid` of this interpreter
    )
    os.environ |= {"COLUMNS": "120", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "UNBRAID_CACHE": str(folder / "cache")}
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="python3", timeout=SECONDS, startup_timeout=SECONDS, resources=where).execute()
    return notebook


def tidy(notebook: Any, folder: Path) -> None:
    """Drop what another machine, or another hour, would print differently: progress, times of cells, folders."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = kept[:1]
            for output in kept[1:]:  # what was flushed in pieces is one text
                if output.output_type == cell.outputs[-1].output_type == "stream":
                    cell.outputs[-1].text += output.text
                else:
                    cell.outputs.append(output)
            for output in cell.outputs:
                if "text" in output:
                    plain = re.sub(r"\x1b\[[\d;]*m", "", output.text).replace(str(folder), "/data")
                    output.text = "\n".join(line.rstrip() for line in plain.splitlines()) + "\n"
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as a page, and its figures by name."""
    import base64
    import json

    parts, figures = [], dict[str, bytes]()
    for n, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        shell = text.startswith("%%bash\n")
        parts.append(f"```{'bash' if shell else 'python'}\n{text.removeprefix('%%bash').strip()}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                figures[f"{path.stem}-{n}.png"] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![figure of the cell above]({path.stem}-{n}.png)")
            elif shown := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"````text\n{shown}\n````")  # a report may hold fences of its own
    return "\n\n".join(parts) + "\n", figures


def main(names: list[str]) -> None:
    """Execute and write."""
    import nbformat

    for path in sorted(TUTORIALS.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            notebook = execute(path, Path(folder))
            tidy(notebook, Path(folder))
            nbformat.write(notebook, path)
            print(f"{path.stem}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
