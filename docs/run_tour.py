"""
Runs the notebook of the tour top to bottom, in one or two minutes of two cores, and keeps its output beside the code.

    python docs/run_tour.py                       # docs/tour.ipynb, in place
    python docs/run_tour.py --output tour.ipynb   # leaves it as it is

What goes to stderr, counters and times of execution are left out: the file changes where what it says does. Cells with
the tag `varies` print what depends on the machine.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


TOUR = Path(__file__).parent / "tour.ipynb"


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the output of its cells. An error in one of them is raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    return notebook


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TOUR, help="Where to write it. Default: in place.")
    args = parser.parse_args(argv)
    notebook = run(TOUR)
    partial = args.output.with_name(f"partial-{args.output.name}")
    nbformat.write(notebook, partial)
    partial.replace(args.output)


if __name__ == "__main__":
    main()
