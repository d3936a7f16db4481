"""Busy scenes: their items, unique answers, and different splits and seeds."""

import numpy as np
from busy_scenes import COLORS, KINDS, SHAPES, draw_scene, one_of_each_kind, vocabulary


SCENES = [draw_scene("train", number) for number in range(40)]


def test_a_scene_is_drawn_from_its_number():
    again = draw_scene("train", 3)
    assert again.items == SCENES[3].items and again.questions == SCENES[3].questions
    assert np.array_equal(again.image, SCENES[3].image)
    for other in (draw_scene("train", 4), draw_scene("test", 3), draw_scene("train", 3, seed=1)):
        assert other.items != again.items


def test_questions_name_one_item_or_an_absent_one():
    for scene in SCENES:
        for question in scene.questions:
            words = set(question.text.split()) & {*COLORS, *SHAPES}
            found = [item for item in scene.items if words <= {item.color, item.shape}]
            if question.answer == "no":  # both words are in the scene, but not on one item
                assert question.region is None and not found
                assert words <= {word for item in scene.items for word in (item.color, item.shape)}
                continue
            (item,) = found
            assert item.box == question.region
            expected = {"color": item.color, "shape": item.shape, "place": item.place}
            assert question.answer == expected.get(question.kind, "yes")


def test_an_item_is_drawn_in_its_box():
    squares = [(scene.image, item) for scene in SCENES[:10] for item in scene.items if item.shape == "square"]
    for image, item in squares:
        x0, y0, _, _ = item.box  # the pixel lies between the mark and the edge
        assert abs(np.asarray(image)[y0 + 3, x0 + 3].astype(int) - COLORS[item.color]).max() <= 26


def test_each_kind_is_asked_once_with_known_words():
    for number, scene in enumerate(SCENES[:3]):
        questions = one_of_each_kind(scene, number)
        assert [question.kind for question in questions] == list(KINDS)
        assert all({*question.text.split(), question.answer} <= {*vocabulary()} for question in questions)
        assert questions == one_of_each_kind(scene, number)
