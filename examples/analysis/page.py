"""HTML pages of the app and the search."""

import base64
import io
from pathlib import Path

import PIL.Image
from jinja2 import Environment

from trips_examples.analysis import SAME_WEIGHTS
from trips_examples.analysis.asking import Look


def render_look(look: Look) -> str:
    """Return the results of an image and its texts as HTML."""
    return filled(Path(__file__).parent / "look.html", look=look, same_weights=SAME_WEIGHTS)


def filled(template: Path, **values) -> str:
    """Render a Jinja template, with the filter `data_uri`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(data_uri=data_uri)
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def data_uri(picture: PIL.Image.Image) -> str:
    """Return an image as a data URI, with a longer side of at most 256 pixels."""
    picture = picture.copy()
    picture.thumbnail((256, 256))
    png = io.BytesIO()
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
