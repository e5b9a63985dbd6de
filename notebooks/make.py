"""Makes the notebooks, *.ipynb, from their texts, *.md; and runs them if asked.

    python notebooks/make.py                        writes each .ipynb beside its .md, without outputs
    python notebooks/make.py --run [FOLDER]         also executes each; with FOLDER, writes it there with its outputs

A text is MyST Markdown with cells of code, as in docs/course.  Edit the .md: a test compares the two.
It needs jupytext, and --run needs nbclient and ipykernel:  pip install jupytext nbclient ipykernel
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = sorted(path for path in HERE.glob("[0-9]*.md"))


def notebook_of(page: Path):
    """The notebook of a text; equal texts give equal notebooks."""
    import jupytext

    notebook = jupytext.read(page)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"cell-{number}"                       # otherwise a random one
    return notebook


def text_of(notebook) -> str:
    """Its JSON, each source as a list of lines, as Jupyter saves it, so that a change shows as a line."""
    as_lines = [{**cell, "source": cell["source"].splitlines(keepends=True)} for cell in notebook["cells"]]
    return json.dumps({**notebook, "cells": as_lines}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def execute(notebook, folder: Path) -> None:
    """Runs every cell in a new kernel, in this folder; an error in a cell is raised."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(folder)}}).execute()


def main(run: str | None) -> None:
    for page in PAGES:
        notebook = notebook_of(page)
        page.with_suffix(".ipynb").write_text(text_of(notebook), encoding="utf-8")
        print(page.with_suffix(".ipynb").name)
        if run is not None:
            execute(notebook, HERE)
            print("    ran")
        if run:
            (Path(run) / f"{page.stem}.ipynb").write_text(text_of(notebook), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="?", const="", metavar="FOLDER", help="executes each notebook")
    main(parser.parse_args().run)
