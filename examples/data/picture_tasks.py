"""Composed scenes and single named images as data of each task. Rows hold texts; a transform makes the images."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import PIL.Image
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Sequence as ListOf

from trips_examples.data.faults import BadRows
from trips_examples.data.picture_scenes import Recipe, SceneMaker
from trips_examples.data.picture_texts import caption, expressions, questions, with_article
from trips_examples.data.pictures import NamedPicture, load_picture, read_pictures, split_of
from trips_examples.data.scenes import NLVR2_STATEMENTS
from trips_examples.data.source import DataSource
from trips_examples.data.splits import as_dataset
from trips_examples.data.tasks import TASKS


# Columns of the rows besides the text columns of their task.
EXTRA_FEATURES = {
    "vqa": {"kind": Value("string"), "recipe": ListOf(Value("int32"))},
    "grounding": {"kind": Value("string"), "recipe": ListOf(Value("int32"))},
    "captions": {"recipe": ListOf(Value("int32"))},
    "nlvr2": {"recipes": ListOf(ListOf(Value("int32")))},
}


def load_picture_scenes(task: str, source: DataSource, bad_rows: BadRows, seed: int) -> DatasetDict:
    """
    Load composed scenes of named images for a task, with the columns of its schema and, for `"vqa"` and `"grounding"`,
    `kind`, the kind of the text. Images are rendered whenever a row is read.

    Raises:
        `ValueError`: Images cannot be used (the message names the first few), or there are too few.
        `FileNotFoundError`: A source does not exist.
    """
    asks_colors = task == "vqa" and "color" in source.question_kinds
    splits = _split(read_pictures(source.pictures, bad_rows, with_colors=asks_colors), source.held_out_names)
    fewest, most = source.pictures_per_scene
    data = {}
    for split, pictures in splits.items():
        maker = SceneMaker(tuple(pictures), split, seed, source.scene_size, (fewest, most))
        rows = [
            {**row, "source": f"{split} {row['source']}"}
            for row in _ROWS[task](maker, source.num_scenes[split])
            if task != "vqa" or row["kind"] in source.question_kinds
        ]
        data[split] = _as_dataset(task, rows).with_transform(SceneImages(maker))
    return DatasetDict(data)


def load_pictures_alone(source: DataSource, bad_rows: BadRows) -> DatasetDict:
    """
    Load single named images on white, for captioning and retrieval: one image per name, with the name as its caption.
    """
    data = {}
    for split, pictures in _split(read_pictures(source.pictures, bad_rows), source.held_out_names).items():
        first = list({picture.name: picture for picture in reversed(pictures)}.values())[::-1]
        rows = [
            {"image_id": picture.path, "caption": picture.name, "source": picture.path, "recipe": [number]}
            for number, picture in enumerate(first)
        ]
        data[split] = _as_dataset("captions", rows).with_transform(LonePictures(tuple(first), source.scene_size))
    return DatasetDict(data)


def _split(pictures: list[NamedPicture], held_out: dict[str, float]) -> dict[str, list[NamedPicture]]:
    splits: dict[str, list[NamedPicture]] = {split: [] for split in ("train", *held_out)}
    for picture in pictures:
        splits[split_of(picture.name, held_out)].append(picture)
    return splits


def _as_dataset(task: str, rows: list[dict]) -> Dataset:
    shown = {name: feature for name, feature in TASKS[task].features.items() if name != TASKS[task].image_column}
    return as_dataset(rows, Features({**shown, **EXTRA_FEATURES[task]}))


@dataclass(frozen=True)
class SceneImages:
    """Transform that adds the images to a batch of rows. Each scene is rendered once per batch."""

    maker: SceneMaker

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        render = functools.cache(self.maker.render)
        if "recipe" in batch:
            batch["image"] = [render(Recipe(*numbers)) for numbers in batch["recipe"]]
        if "recipes" in batch:
            batch["images"] = [[render(Recipe(*numbers)) for numbers in both] for both in batch["recipes"]]
        return batch


@dataclass(frozen=True)
class LonePictures:
    """Transform that adds the images to a batch of rows, each centered on a white square."""

    pictures: tuple[NamedPicture, ...]
    side: int

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "recipe" in batch:
            batch["image"] = [self.image(self.pictures[number]) for (number,) in batch["recipe"]]
        return batch

    def image(self, picture: NamedPicture) -> PIL.Image.Image:
        scale = 0.9 * self.side / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        image = load_picture(picture, self.side).resize((width, height))
        canvas = PIL.Image.new("RGB", (self.side, self.side), "white")
        canvas.paste(image, ((self.side - width) // 2, (self.side - height) // 2), image)
        return canvas


def _shared(maker: SceneMaker, recipe: Recipe, number: int) -> dict:
    recipe_numbers = list(map(int, recipe))
    return {"image_id": f"{maker.split} scene {recipe.number}", "recipe": recipe_numbers, "source": f"row {number}"}


def _grounding_rows(maker: SceneMaker, num_scenes: int) -> Iterator[dict]:
    row = 0
    for recipe in map(Recipe, range(num_scenes)):
        for kind, text, box, _ in expressions(maker.things(recipe), maker.rng(recipe.number, "texts")):
            row += 1
            yield {
                **_shared(maker, recipe, row),
                "question_id": str(row),
                "kind": kind,
                "expression": text,
                "box": box,
            }


def _vqa_rows(maker: SceneMaker, num_scenes: int) -> Iterator[dict]:
    row = 0
    for recipe in map(Recipe, range(num_scenes)):
        things, rng = maker.things(recipe), maker.rng(recipe.number, "texts")
        for kind, text, box, answer in questions(things, maker.names, maker.side, rng):
            row += 1
            about = {"kind": kind, "answer_type": None, "question": text, "answers": [answer], "region": box}
            yield {**_shared(maker, recipe, row), "question_id": str(row), **about}


def _caption_rows(maker: SceneMaker, num_scenes: int) -> Iterator[dict]:
    row = 0
    for recipe in map(Recipe, range(num_scenes)):
        rng, things = maker.rng(recipe.number, "texts"), maker.things(recipe)
        for _ in range(2):
            row += 1
            yield {**_shared(maker, recipe, row), "caption": caption(things, maker.side, rng)}


def _nlvr2_rows(maker: SceneMaker, num_statements: int) -> Iterator[dict]:
    """Yield each statement with a pair of scenes for which it is true and a pair for which it is false."""
    for number in range(num_statements):
        rng = maker.rng(number, "texts")
        statement, pairs = rng.choice(sorted(NLVR2_STATEMENTS.items()))
        picture = rng.randrange(len(maker.pictures))
        text = statement.format(with_article(maker.pictures[picture].name))
        for label, choices in zip((1, 0), pairs):
            row = 2 * number + 2 - label
            first = 4 * number + 2 * (1 - label)
            recipes = [Recipe(first + side, picture, has) for side, has in enumerate(rng.choice(choices))]
            yield {
                "image_ids": [f"{maker.split} scene {recipe.number}" for recipe in recipes],
                "recipes": [list(map(int, recipe)) for recipe in recipes],
                "question_id": str(row),
                "statement": text,
                "label": label,
                "source": f"row {row}",
            }


_ROWS = {"vqa": _vqa_rows, "captions": _caption_rows, "nlvr2": _nlvr2_rows, "grounding": _grounding_rows}
