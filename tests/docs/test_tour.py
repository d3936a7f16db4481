"""The notebook of the docs runs as it stands."""

import pytest
from places import ROOT


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.mark.slow
def test_the_tour_runs_and_says_the_same(tmp_path):
    path = ROOT / "docs/tour.ipynb"
    tour = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    ran = nbclient.NotebookClient(tour, timeout=3000, resources=folder).execute()
    assert (tmp_path / "walk.png").stat().st_size > 10_000
    printed = []
    for notebook in (ran, nbformat.read(path, as_version=4)):
        texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
        printed.append([text for text in texts if "tokens" in text or "kept" in text])
    assert printed[0] == printed[1]
    assert len(printed[0]) == 2
