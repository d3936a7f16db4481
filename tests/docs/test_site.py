"""`make docs` builds the site without warnings and network, with a complete API reference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES
from places import ROOT

import modeling_trips


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the site with the Makefile's command in another folder."""
    folder = tmp_path_factory.mktemp("site")
    (command,) = re.findall(
        r"^docs:.*\n\t\$\(BIN\)/python (.*) build/docs$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    result = subprocess.run([sys.executable, *command.split(), str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.mark.slow
def test_every_page_is_in_it(site):
    for page in PAGES:
        html = (site / page.path.relative_to(ROOT / "docs")).with_suffix(".html")
        assert html.stat().st_size > 5000, page


@pytest.mark.slow
def test_the_notebook_is_shown_with_its_output(site):
    html = (site / "tour.html").read_text()
    assert (
        "of the kept patches show the shape asked about" in html
        and len(re.findall(r'<img [^>]*src="_images/', html)) == 3
    )


@pytest.mark.slow
def test_all_public_names_are_in_the_api(site):
    api = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    documented = set(re.findall(r'id="modeling_trips\.(\w+)"', api))
    assert set(modeling_trips.__all__) - documented <= {"__version__"}


@pytest.mark.slow
def test_docstrings_came_through_as_prose(site):
    """Docstrings have no Markdown left, and each argument has its type."""
    for path in (site / "api").glob("*.html"):
        text = re.sub(r"<pre>.*?</pre>|<script.*?</script>|<style.*?</style>", "", path.read_text(), flags=re.DOTALL)
        assert "[`" not in text and "<Tip" not in text and not re.search(r"[^`]``[^`]", text), path
    hosts = (site / "api/hosts.html").read_text()
    (entry,) = re.findall(r"<li><p><strong>schedule</strong>(.*?)</p>", hosts, re.DOTALL)
    assert re.sub(r"<.*?>|\s+", " ", entry).split()[:4] == ["(", "SelectionSchedule", "or", "str"]


@pytest.mark.slow
def test_it_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.search(r"<(?:script|img|link)[^>]+(?:src|href)=\"(?:https?:)?//", path.read_text()), path
