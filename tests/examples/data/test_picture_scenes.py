"""Composed scenes of named images: determinism, no overlap, controlled images, and texts."""

import random

import pytest
from named_pictures import write_pictures

from trips_examples.data.picture_scenes import Recipe, SceneMaker, Thing
from trips_examples.data.picture_texts import caption, expressions, questions
from trips_examples.data.pictures import NamedPicture, read_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tuple(read_pictures([write_pictures(tmp_path_factory.mktemp("pictures"))]))


def overlap(box, other) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def test_things_lie_apart_within_the_scene_in_their_proportions(pictures):
    maker = SceneMaker(pictures, "train", side=120)
    counts = set()
    for number in range(100):
        things = maker.things(Recipe(number))
        counts.add(len(things))
        boxes = [thing.box for thing in things]
        assert all(0 <= x0 < x1 <= 120 and 0 <= y0 < y1 <= 120 for x0, y0, x1, y1 in boxes)
        assert not any(overlap(box, other) for place, box in enumerate(boxes) for other in boxes[:place])
        for thing in things:
            width, height = thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]
            wide, high = thing.picture.size
            assert abs(width * high - height * wide) <= max(wide, high)  # but for rounding
    assert counts == set(range(2, 10))


def test_a_scene_is_the_same_whenever_it_is_made(pictures):
    maker, again = (SceneMaker(pictures, "train", seed=3, side=64) for _ in range(2))
    images = [maker.render(Recipe(number)).tobytes() for number in range(6)]
    assert images == [again.render(Recipe(number)).tobytes() for number in reversed(range(6))][::-1]
    assert len(set(images)) == 6
    for other in (SceneMaker(pictures, "train", seed=4, side=64), SceneMaker(pictures, "validation", seed=3, side=64)):
        assert other.things(Recipe(0)) != maker.things(Recipe(0))


def test_a_box_is_where_its_picture_is_seen(pictures):
    maker = SceneMaker(pictures, "train", side=160)
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0)}
    checked = 0
    for number in range(30):
        scene = maker.render(Recipe(number))
        for thing in maker.things(Recipe(number)):
            color = colors.get(thing.name.split()[0])
            if color is not None:
                x0, y0, x1, y1 = thing.box
                inner = scene.crop((x0, y0, x1, y1)).getcolors(1)
                assert inner == [((x1 - x0) * (y1 - y0), color)]
                checked += 1
    assert checked > 20


def test_a_recipe_decides_whether_a_name_is_there(pictures):
    maker = SceneMaker(pictures, "train", side=120)
    for number in range(60):
        for picture in (0, 7):
            name = pictures[picture].name
            with_it, without = (maker.things(Recipe(number, picture, has)) for has in (True, False))
            assert [thing.name for thing in with_it].count(name) == 1
            assert name not in [thing.name for thing in without]


def test_scenes_need_several_names(pictures):
    with pytest.raises(ValueError, match="validation.* 1 names"):
        SceneMaker(pictures[:1], "validation")


def thing(name: str, *box: int, color: str = "") -> Thing:
    return Thing(NamedPicture(name, name, (0, 0, 9, 9), color), box)


# An owl on the left, a small and a large apple on the right, a bat at the bottom.
OWL, SMALL, LARGE = thing("owl", 0, 10, 20, 50), thing("apple", 40, 0, 50, 10), thing("apple", 60, 10, 90, 40)
BAT = thing("bat", 33, 80, 53, 100)
THINGS = (OWL, SMALL, LARGE, BAT)


def test_expressions_fit_one_thing():
    found = {
        (kind, text): box for seed in range(20) for kind, text, box, _ in expressions(THINGS, random.Random(seed))
    }
    assert found == {
        ("name", "the owl"): OWL.box,
        ("name", "the bat"): BAT.box,
        ("size", "the smaller apple"): SMALL.box,
        ("size", "the larger apple"): LARGE.box,
        ("place", "what is left of the bat"): OWL.box,
        ("place", "what is below the owl"): BAT.box,
    }


def asked(things, seeds: int = 80) -> dict:
    found = set()
    for seed in range(seeds):
        found |= set(questions(things, ["owl", "apple", "bat", "cow"], 100, random.Random(seed)))
    return {(kind, text, answer): box for kind, text, box, answer in found}


def test_questions_have_their_answers_and_regions():
    both = (0, 10, 53, 100)
    assert asked(THINGS) == {
        ("name", "what is left of the bat?", "owl"): OWL.box,
        ("name", "what is below the owl?", "bat"): BAT.box,
        ("name", "which is further left, the owl or the bat?", "owl"): both,
        ("name", "which is further left, the bat or the owl?", "owl"): both,
        ("side", "is the owl on the left or on the right?", "left"): OWL.box,
        ("side", "is the owl at the top or at the bottom?", "top"): OWL.box,
        ("side", "is the bat at the top or at the bottom?", "bottom"): BAT.box,  # near the middle
        ("place", "is the owl left of the bat?", "yes"): both,
        ("place", "is the owl right of the bat?", "no"): both,
        ("place", "is the owl above the bat?", "yes"): both,
        ("place", "is the owl below the bat?", "no"): both,
        ("place", "is the bat left of the owl?", "no"): both,
        ("place", "is the bat right of the owl?", "yes"): both,
        ("place", "is the bat above the owl?", "no"): both,
        ("place", "is the bat below the owl?", "yes"): both,
        ("size", "is the owl larger than the bat?", "yes"): both,
        ("size", "is the bat larger than the owl?", "no"): both,
        ("count", "how many times is the apple there?", "2"): (40, 0, 90, 40),
        ("presence", "is there an owl?", "yes"): OWL.box,
        ("presence", "is there an apple?", "yes"): (40, 0, 90, 40),
        ("presence", "is there a bat?", "yes"): BAT.box,
        ("presence", "is there a cow?", "no"): None,
    }


def test_colors_are_asked_for_of_what_has_one_that_its_name_does_not_tell():
    colored = (
        thing("owl", 0, 10, 20, 50, color="brown"),
        thing("gray bat", 33, 80, 53, 100, color="gray"),
        thing("grey cat", 33, 50, 53, 70, color="gray"),
        thing("cow", 60, 60, 80, 80),
        thing("apple", 40, 0, 50, 10, color="red"),
        thing("apple", 60, 10, 90, 40, color="green"),
    )
    found = {key: box for key, box in asked(colored).items() if key[0] == "color"}
    assert found == {("color", "what color is the owl?", "brown"): (0, 10, 20, 50)}


def test_what_hardly_differs_is_not_asked_for():
    alike = (thing("owl", 40, 40, 60, 60), thing("cow", 45, 62, 66, 82))  # in the middle, one above the other
    found = [(kind, text, answer) for kind, text, answer in asked(alike) if kind in ("name", "side", "place", "size")]
    assert sorted(found) == [
        ("name", "what is above the cow?", "owl"),
        ("name", "what is below the owl?", "cow"),
        ("place", "is the cow above the owl?", "no"),
        ("place", "is the cow below the owl?", "yes"),
        ("place", "is the owl above the cow?", "yes"),
        ("place", "is the owl below the cow?", "no"),
        ("side", "is the cow at the top or at the bottom?", "bottom"),
    ]
    large = (OWL, thing("cow", 50, 50, 100, 100))
    assert asked(large)[("name", "what is the largest thing?", "cow")] == (50, 50, 100, 100)


def test_a_caption_places_each_of_the_four_largest_things_once():
    captions = [caption((*THINGS, thing("ant", 70, 70, 72, 72)), 100, random.Random(seed)) for seed in range(5)]
    parts = ["a bat at the bottom", "an apple at the top", "an apple at the top right", "an owl at the top left"]
    assert [sorted(each.split(", ")) for each in captions] == [parts] * 5 and len(set(captions)) > 1
