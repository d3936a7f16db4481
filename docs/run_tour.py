"""
Run the notebook of the tour and store its output, in one or two minutes of two cores.

    python docs/run_tour.py                       # docs/tour.ipynb, in place
    python docs/run_tour.py --output tour.ipynb   # a copy

Stderr, counters and times of execution are not stored, so the file changes only where the output does. Cells with the
tag `varies` print what depends on the machine.
"""

from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from trips_examples.training.files import write_whole
from trips_examples.training.parser import make_parser


TOUR = Path(__file__).parent / "tour.ipynb"


@dataclass
class TourArguments:
    output: str = field(default=str(TOUR), metadata={"help": "File of the notebook. Default: in place."})


def run(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with the output of its cells; an error in a cell is raised."""
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
    (args,) = make_parser(TourArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    write_whole(args.output, nbformat.writes(run(TOUR)) + "\n")


if __name__ == "__main__":
    main()
