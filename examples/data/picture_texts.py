"""What is said and asked about scenes of pictures, with the part of the scene that each text is about."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trips_examples.data.colors import COLOR_WORDS
from trips_examples.data.picture_scenes import Thing


CLEARLY_LARGER = 1.7  # times the area
CLEARLY_BESIDE = 0.1  # of the scene's side, between centers
MAX_CAPTIONED = 4

# By place: the axis, and whether what is there comes before what it is compared with.
PLACES = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}
# By axis: its two ends, and what stands before them.
SIDES = (("left", "right", "on the"), ("top", "bottom", "at the"))
# What is asked: a name; which side of the scene a thing is on; whether it is on one side of another, or larger; how
# often it is there, and whether; its color. Only the first is answered in words that a training may not have.
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
        kind (`str`): what must be told apart: `"name"`, `"size"`, `"place"`, and of questions one of
            `QUESTION_KINDS`.
        text (`str`): an expression or a question.
        box (`tuple`, *optional*): (x0, y0, x1, y1) in pixels of what it is about; None where that is not there.
        answer (`str`): of a question.
    """

    kind: str
    text: str
    box: tuple[int, int, int, int] | None
    answer: str = ""


def expressions(things: Sequence[Thing], rng: random.Random) -> Iterator[SceneText]:
    """
    Expressions that each fit one thing: up to three names that only one has, both of two of one name of which one is
    clearly larger, and the only thing on one side of another.
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
    Questions and answers of all `QUESTION_KINDS`, in their order, as far as the scene has what they ask for; about
    presence two, of a name that is there and of one of `names` that is not.

    Args:
        things (`Sequence[Thing]`): what is in the scene.
        names (`Sequence[str]`): that it might have had.
        side (`int`): of the scene in pixels.
        rng (`random.Random`): of all choices.
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
    """The largest things with their places, up to `MAX_CAPTIONED`, in any order."""
    largest = sorted(things, key=lambda thing: -thing.area)[:MAX_CAPTIONED]
    return ", ".join(f"{with_article(thing.name)} {_cell(thing, side)}" for thing in rng.sample(largest, len(largest)))


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _named(things: Sequence[Thing], single: list[Thing], rng: random.Random) -> Iterator[SceneText]:
    """Asks for names: of the only thing on one side of another, the clearly largest, the further left of two."""
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
    """Whether a thing has one color, and a name that speaks of none."""
    return bool(thing.picture.color) and not set(thing.name.split()) & COLOR_WORDS


def _pair(things: Sequence[Thing]) -> tuple[Thing, Thing] | None:
    """The two things of the name that exactly two have, if one is clearly larger: the smaller one first."""
    times = Counter(thing.name for thing in things)
    pair = sorted((thing for thing in things if times[thing.name] == 2), key=lambda thing: thing.area)
    if len(pair) != 2 or pair[1].area < CLEARLY_LARGER * pair[0].area:
        return None
    return pair[0], pair[1]


def _beside(things: Sequence[Thing], rng: random.Random) -> tuple[str, Thing, Thing] | None:
    """A place, a thing of a name of its own, and the only other thing there, if there is such a pair."""
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
    """The extent of all things, for what is clearly beside what."""
    return max(max(thing.box[2:]) for thing in things)


def _union(things: Sequence[Thing]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = zip(*(thing.box for thing in things))
    return min(x0), min(y0), max(x1), max(y1)


def _cell(thing: Thing, side: int) -> str:
    x, y = (min(2, int(3 * center / side)) for center in thing.center)
    return CELLS[y][x]
