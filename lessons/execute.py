"""Run notebooks of this folder from the first cell to the last, in place:

    python lessons/execute.py [NAME ...]

The environment variable LESSON chooses the form (lab.py). Prints the minutes that each took, by the clock and
of a core. --copy=FOLDER writes the notebooks there instead. After LESSON=full, what labs trained is copied to
lessons/rows.
"""

import os
import resource
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
# Of what a lab trained and measured
COPIED = ("*.csv", "*.json", "*.txt", "target.py", "frontier.png", "verify.png")
LEFT_OUT = {"predictions.json", "report.json", "copy", "python_topics.txt"}  # files and folders


def execute(notebook):
    """Fills the outputs of a notebook, of nbformat. What it writes to stderr, such as bars, is left out.
    Raises nbclient's CellExecutionError where a cell fails."""
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ each time
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def copy_rows(name):
    source = HERE.parent / "out" / "lessons" / f"{name}-full"
    for pattern in COPIED:
        for path in source.rglob(pattern):
            if not LEFT_OUT & {*path.parts}:
                target = HERE / "rows" / name / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def main(words):
    copies = [word.partition("=")[2] for word in words if word.startswith("--copy=")]
    names = [Path(word).stem for word in words if not word.startswith("--")]
    for path in sorted(HERE.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        execute(notebook)
        nbformat.write(notebook, Path(copies[0], path.name) if copies else path)
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
        print(f"{path.stem}: {(time.perf_counter() - start) / 60:.1f} minutes, {used / 60:.1f} CPU minutes",
              flush=True)
        if os.environ.get("LESSON") == "full":
            copy_rows(path.stem)


if __name__ == "__main__":
    main(sys.argv[1:])
