"""The notebook and its figure's script run without network and reproduce the stored output."""

import os
import re
import subprocess
import sys

import nbformat
import PIL.Image
import pytest
from nbformat import NotebookNode
from places import ROOT


TOUR = ROOT / "docs/tour.ipynb"


def run(*command: str):
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"), "1")
    subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **offline}, check=True)


def read(path) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> list[str]:
    """Return the output of a cell as text; images by type."""
    return [output.text if "text" in output else str(sorted(output.data)) for output in cell.outputs]


def test_it_is_kept_with_its_output():
    cells = read(TOUR)
    silent = [cell.source for cell in cells if not cell.outputs]
    assert len(cells) > 8 and all(source.startswith("%%capture") for source in silent)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 3
    assert all(output.output_type != "error" and output.get("name") != "stderr" for c in cells for output in c.outputs)


@pytest.mark.slow
def test_it_runs_and_prints_what_is_kept(tmp_path):
    run("docs/run_tour.py", "--output", str(tmp_path / "tour.ipynb"))
    kept, cells = read(TOUR), read(tmp_path / "tour.ipynb")
    assert [cell.source for cell in cells] == [cell.source for cell in kept]
    for cell, own in zip(cells, kept):
        if "varies" not in cell.metadata.get("tags", []):
            assert printed(cell) == printed(own), cell.source
    (result,) = [text for cell in cells for text in printed(cell) if text.startswith("before")]
    untrained, trained, _ = (
        [float(share) for share in re.findall(r" ([\d.]+)%", line)[:3]] for line in result.splitlines()
    )
    assert all(one + 5 < other and other > 85 for one, other in zip(untrained, trained))


@pytest.mark.slow
def test_the_figure_is_drawn(tmp_path):
    run("docs/draw_walk.py", "--output", str(tmp_path / "walk.png"))
    with PIL.Image.open(tmp_path / "walk.png") as drawn, PIL.Image.open(ROOT / "docs/walk.png") as kept:
        assert drawn.size == kept.size
        assert drawn.convert("L").getextrema() == (0, 255) == kept.convert("L").getextrema()
