"""Reports of a comparison: a self-contained HTML page, and JSON."""

import base64
import io
from dataclasses import asdict
from pathlib import Path

import PIL.Image
from jinja2 import Environment

from trips_examples.analysis import SAME_WEIGHTS
from trips_examples.analysis.asking import Look
from trips_examples.analysis.comparison import Comparison, Group, Item


TEMPLATES = Path(__file__).parent
SIGNIFICANT = 0.05


def render(
    comparison: Comparison,
    names: tuple[str, str],
    worst: list[tuple[Group, list[tuple[Item, list[tuple[str, PIL.Image.Image]]]]]],
    num_changed: int = 100,
    note: str | None = None,
) -> str:
    """
    Return the HTML page.

    Args:
        comparison ([`Comparison`])
        names (`tuple[str, str]`): Names of both models.
        worst (`list`): Groups, and some of their items with titled images.
        num_changed (`int`, *optional*, defaults to 100): Number of changed answers to list; the JSON has all.
        note (`str`, *optional*): Note about the other model.
    """
    return filled(
        TEMPLATES / "page.html",
        comparison=comparison,
        overall=comparison.overall,
        verdict=verdict(comparison.overall),
        model=names[0],
        other=names[1],
        note=note,
        worst=worst,
        changed=comparison.changed[:num_changed],
        significant=SIGNIFICANT,
    )


def render_look(look: Look) -> str:
    """Return the results of an image and its texts as HTML."""
    return filled(TEMPLATES / "look.html", look=look, same_weights=SAME_WEIGHTS)


def filled(template: Path, **values) -> str:
    """Render a Jinja template, with the filters `percent`, `data_uri` and `chance`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=lambda share: f"{share:.1%}", data_uri=data_uri, chance=_chance)
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def verdict(group: Group) -> str:
    """Return the outcome in a sentence."""
    if group.lost + group.won == 0:
        return "No item changes between right and wrong."
    changes = f"{group.lost} items are lost and {group.won} won"
    if group.p_value >= SIGNIFICANT:
        return f"{changes}: no more than chance would give ({_p(group.p_value)})."
    word = "worse" if group.lost > group.won else "better"
    return f"{changes}: it is {word} by more than chance ({_p(group.p_value)})."


def as_json(comparison: Comparison, names: tuple[str, str], note: str | None = None) -> dict:
    """Return the content of the page, and all changed answers."""
    groups = [{**asdict(group), "difference": group.difference} for group in comparison.groups]
    overall = {**asdict(comparison.overall), "difference": comparison.overall.difference}
    changed = [asdict(item) for item in comparison.changed]
    models = {"model": names[0], "other": names[1], **({"note": note} if note else {})}
    return {**models, "overall": overall, "groups": groups, "changed": changed}


def data_uri(picture: PIL.Image.Image) -> str:
    """Return an image as a data URI, with a longer side of at most 256 pixels."""
    picture = picture.copy()
    picture.thumbnail((256, 256))
    png = io.BytesIO()
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")


def _p(p: float) -> str:
    return f"p {_chance(p)}" if p < 0.001 else f"p = {_chance(p)}"


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
