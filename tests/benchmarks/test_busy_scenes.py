"""Busy scenes: their items, unique answers, and different splits and seeds."""

import numpy as np
from busy_scenes import (
    COLORS,
    KINDS,
    SHAPES,
    draw_scene,
    one_of_each_kind,
    vocabulary,
)


SCENES = [draw_scene("train", number) for number in range(40)]


def test_a_scene_is_drawn_from_its_number():
    again = draw_scene("train", 3)
    assert again.items == SCENES[3].items and again.questions == SCENES[3].questions
    assert np.array_equal(again.image, SCENES[3].image)
    for other in (draw_scene("train", 4), draw_scene("test", 3), draw_scene("train", 3, seed=1)):
        assert other.items != again.items


def test_questions_name_one_item():
    for scene in SCENES:
        for question in scene.questions:
            if question.answer == "no":
                assert question.region is None
                continue
            words = set(question.text.split()) & {*COLORS, *SHAPES}
            (item,) = [item for item in scene.items if words <= {item.color, item.shape}]
            assert item.box == question.region
            expected = {"color": item.color, "shape": item.shape, "place": item.place}
            assert question.answer == expected.get(question.kind, "yes")


def test_absent_items_have_a_color_and_a_shape_of_the_scene():
    for scene in SCENES:
        names = {item.name for item in scene.items}
        for question in scene.questions:
            if question.answer == "no":
                *_, color, shape, _ = question.text.split()
                assert f"{color} {shape}" not in names
                assert color in {item.color for item in scene.items}
                assert shape in {item.shape for item in scene.items}


def test_the_middle_of_an_item_has_its_color():
    """The pixel lies between the mark and the edge."""
    for scene in SCENES[:10]:
        for item in (item for item in scene.items if item.shape == "square"):
            x0, y0, _, _ = item.box
            pixel = np.asarray(scene.image)[y0 + 3, x0 + 3].astype(int)
            assert abs(pixel - COLORS[item.color]).max() <= 26


def test_each_kind_is_asked_once_with_known_words():
    words = set(vocabulary())
    for number, scene in enumerate(SCENES[:3]):
        questions = one_of_each_kind(scene, number)
        assert [question.kind for question in questions] == list(KINDS)
        assert all({*question.text.split(), question.answer} <= words for question in questions)
        assert questions == one_of_each_kind(scene, number)
