"""Expressions, questions and captions of composed scenes, with the target region of each text."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trips_examples.data.colors import COLOR_WORDS
from trips_examples.data.picture_scenes import Thing


CLEARLY_LARGER = 1.7  # smallest ratio of areas
CLEARLY_BESIDE = 0.1  # smallest distance of centers, as a share of the scene's side
MAX_CAPTIONED = 4

# The axis of each relation, and whether the object comes before its reference on that axis.
PLACES = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}
# The two ends of each axis, and the words before them.
SIDES = (("left", "right", "on the"), ("top", "bottom", "at the"))
# Questions about the name of an object; the side of the scene; whether it is on one side of another object, or larger;
# the number of objects of a name, and their presence; the color. Only names may be words that training does not have.
QUESTION_KINDS = ("name", "side", "place", "size", "count", "presence", "color")
CELLS = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


class SceneText(NamedTuple):
    """
    A text about a scene.

    Args:
        kind (`str`): kind of an expression (`"name"`, `"size"` or `"place"`) or question (one of `QUESTION_KINDS`).
        text (`str`): an expression or a question.
        box (`tuple`, *optional*): target region (x0, y0, x1, y1) in pixels; None for an absent object.
        answer (`str`): answer of a question.
    """

    kind: str
    text: str
    box: tuple[int, int, int, int] | None
    answer: str = ""


def expressions(things: Sequence[Thing], rng: random.Random) -> Iterator[SceneText]:
    """
    Yield expressions that each fit one object: up to three unique names, both objects of one name if one is clearly
    larger, and the only object on one side of another.
    """
    single = _single(things)
    for thing in rng.sample(single, min(3, len(single))):
        yield SceneText("name", f"the {thing.name}", thing.box)
    if pair := _pair(things):
        for thing, word in zip(pair, ("smaller", "larger")):
            yield SceneText("size", f"the {word} {thing.name}", thing.box)
    if beside := _beside(things, rng):
        place, anchor, thing = beside
        yield SceneText("place", f"what is {place} the {anchor.name}", thing.box)


def questions(things: Sequence[Thing], names: Sequence[str], side: int, rng: random.Random) -> Iterator[SceneText]:
    """
    Yield questions and answers of all `QUESTION_KINDS` that the scene allows, in that order. Presence has two
    questions: about a name in the scene, and about one of `names` that is absent.

    Args:
        things (`Sequence[Thing]`): objects in the scene.
        names (`Sequence[str]`): all names of the split.
        side (`int`): side of the scene in pixels.
        rng (`random.Random`)
    """
    single = _single(things)
    yield from _named(things, single, rng)
    if single:
        thing, axis = rng.choice(single), rng.randrange(2)
        if abs(thing.center[axis] - side / 2) >= CLEARLY_BESIDE * side:
            first, last, at = SIDES[axis]
            answer = first if thing.center[axis] < side / 2 else last
            yield SceneText("side", f"is the {thing.name} {at} {first} or {at} {last}?", thing.box, answer)
    if len(single) > 1:
        thing, other = pair = rng.sample(single, 2)
        place, (axis, is_before) = rng.choice(sorted(PLACES.items()))
        distance = thing.center[axis] - other.center[axis]
        if abs(distance) >= CLEARLY_BESIDE * side:
            answer = "yes" if (distance < 0) == is_before else "no"
            yield SceneText("place", f"is the {thing.name} {place} the {other.name}?", _union(pair), answer)
        if max(thing.area, other.area) >= CLEARLY_LARGER * min(thing.area, other.area):
            answer = "yes" if thing.area > other.area else "no"
            yield SceneText("size", f"is the {thing.name} larger than the {other.name}?", _union(pair), answer)
    times = Counter(thing.name for thing in things)
    name = max(times, key=lambda name: (times[name], rng.random()))
    counted = [thing for thing in things if thing.name == name]
    yield SceneText("count", f"how many times is the {name} there?", _union(counted), str(times[name]))
    present = rng.choice(things)
    boxes = [thing for thing in things if thing.name == present.name]
    yield SceneText("presence", f"is there {with_article(present.name)}?", _union(boxes), "yes")
    if absent := [name for name in names if name not in times]:
        yield SceneText("presence", f"is there {with_article(rng.choice(absent))}?", None, "no")
    if colored := [thing for thing in single if _has_untold_color(thing)]:
        thing = rng.choice(colored)
        yield SceneText("color", f"what color is the {thing.name}?", thing.box, thing.picture.color)


def caption(things: Sequence[Thing], side: int, rng: random.Random) -> str:
    """Return a caption of the `MAX_CAPTIONED` largest objects with their positions, in random order."""
    largest = sorted(things, key=lambda thing: -thing.area)[:MAX_CAPTIONED]
    return ", ".join(f"{with_article(thing.name)} {_cell(thing, side)}" for thing in rng.sample(largest, len(largest)))


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _named(things: Sequence[Thing], single: list[Thing], rng: random.Random) -> Iterator[SceneText]:
    """Yield questions for a name: of the only object beside another, the largest object, the further left of two."""
    if beside := _beside(things, rng):
        place, anchor, thing = beside
        yield SceneText("name", f"what is {place} the {anchor.name}?", thing.box, thing.name)
    *_, second, largest = sorted(things, key=lambda thing: thing.area)
    if largest.area >= CLEARLY_LARGER * second.area and largest in single:
        yield SceneText("name", "what is the largest thing?", largest.box, largest.name)
    if len(single) > 1:
        pair = rng.sample(single, 2)
        left, right = sorted(pair, key=lambda thing: thing.center[0])
        if right.center[0] - left.center[0] >= CLEARLY_BESIDE * _side(things):
            asked = " or ".join(f"the {thing.name}" for thing in pair)
            yield SceneText("name", f"which is further left, {asked}?", _union(pair), left.name)


def _single(things: Sequence[Thing]) -> list[Thing]:
    times = Counter(thing.name for thing in things)
    return [thing for thing in things if times[thing.name] == 1]


def _has_untold_color(thing: Thing) -> bool:
    """Return whether an object has one color that its name does not mention."""
    return bool(thing.picture.color) and not set(thing.name.split()) & COLOR_WORDS


def _pair(things: Sequence[Thing]) -> tuple[Thing, Thing] | None:
    """Return two objects that share a name no third one has, the smaller one first, if one is clearly larger."""
    times = Counter(thing.name for thing in things)
    pair = sorted((thing for thing in things if times[thing.name] == 2), key=lambda thing: thing.area)
    if len(pair) != 2 or pair[1].area < CLEARLY_LARGER * pair[0].area:
        return None
    return pair[0], pair[1]


def _beside(things: Sequence[Thing], rng: random.Random) -> tuple[str, Thing, Thing] | None:
    """Return a relation, a reference object with a unique name, and the only object in that relation, if any."""
    found = []
    margin = CLEARLY_BESIDE * _side(things)
    for anchor in _single(things):
        for place, (axis, is_before) in PLACES.items():
            distances = {thing: (thing.center[axis] - anchor.center[axis]) for thing in things if thing is not anchor}
            ahead = {thing: -far if is_before else far for thing, far in distances.items()}
            there = [thing for thing, far in ahead.items() if far > 0]
            if len(there) == 1 and ahead[there[0]] >= margin and there[0] in _single(things):
                found.append((place, anchor, there[0]))
    return rng.choice(found) if found else None


def _side(things: Sequence[Thing]) -> int:
    """Return the largest coordinate of all objects, as an estimate of the scene's side."""
    return max(max(thing.box[2:]) for thing in things)


def _union(things: Sequence[Thing]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = zip(*(thing.box for thing in things))
    return min(x0), min(y0), max(x1), max(y1)


def _cell(thing: Thing, side: int) -> str:
    x, y = (min(2, int(3 * center / side)) for center in thing.center)
    return CELLS[y][x]
