"""Run the notebooks on a finished run and write them with their pictures: ``python -m experiments.notebooks.render``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
SOURCES = tuple(sorted(FOLDER.glob("[0-9]*.py")))
"""The notebooks, in the order they are read."""


def executed(source: Path, run: Path, timeout: int = 600) -> NotebookNode:
    """Run a notebook and return it with what its cells show.

    Parameters
    ----------
    source
        One of `SOURCES`.
    run
        Folder of the finished run that it reads.
    timeout
        Seconds a cell may take.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        Where a cell fails.
    """
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    # A backend from outside would keep the pictures out of the page, and a bar that needs widgets warns that it has none.
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    environment |= {"GROUNDSCOPE_RUN": str(run.resolve()), "PYTHONWARNINGS": "ignore:IProgress not found"}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
    with TemporaryDirectory() as folder:
        # Sockets in a folder instead of ports: nothing listens on the network.
        manager = client.create_kernel_manager()
        manager.transport, manager.ip = "ipc", f"{folder}/kernel"
        client.execute(env=environment)
    for number, cell in enumerate(notebook.cells):
        # Drawn names, when it ran, and how long, would make every rendering differ.
        cell["id"] = f"{source.stem}-{number}"
        cell.metadata.pop("execution", None)
    return notebook


def main() -> None:
    """Render every notebook into a folder."""
    import nbformat

    parser = argparse.ArgumentParser(
        description="Run the notebooks on a finished run and write them with their pictures."
    )
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/notebooks"), help="where the .ipynb files go")
    options = parser.parse_args()
    if not (options.run / "report.html").is_file():
        parser.error(f"{options.run} is not a finished run: make one with `groundscope`, or name one with --run")
    options.out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        print(f"{source.stem} …", flush=True)
        nbformat.write(executed(source, options.run), options.out / f"{source.stem}.ipynb")


if __name__ == "__main__":
    main()
