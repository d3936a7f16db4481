r"""
Compose scenes of named images, with questions and expressions about them, as image files and JSON lines.

    apt-get download fonts-noto-color-emoji unicode-cldr-core
    for package in *.deb; do dpkg-deb -x "$package" debian; done
    python benchmarks/images/make_scenes.py --debian debian --output_dir drawn
    python examples/run_vqa.py --train_file drawn/train.jsonl --validation_file drawn/validation.jsonl ...
    python examples/run_grounding.py --train_file drawn/train_boxes.jsonl ...

The images are Noto's emoji with their names in CLDR, from these Debian packages, or those of `--pictures`, named as
their files without words that have digits. All splits share `--names` names, which a hash chooses.
"""

import hashlib
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import PIL.ImageDraw
from tqdm.auto import tqdm

from modeling_trips.inspection.files import whole_folder
from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CHARACTER_NAMES = "usr/share/unicode/cldr/common/annotations/en.xml"
SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}
MAX_WORDS = 4
SMALLEST_HASH = 0.3  # of a name that occurs: that of the scenes of docs/evidence.md

NUM_THINGS = (2, 4)  # in a scene
SMALLEST = 0.2  # longer side of an image, as a share of the scene's side
LARGEST = 0.5
NUM_TRIES = 60  # attempts to find a free place before the image is made smaller
CLEARLY_LARGER = 1.7  # smallest ratio of areas
# The axis of each relation, and the direction from the reference to the object on that axis.
PLACES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, x1 and y1 exclusive


@dataclass
class SceneArguments:
    output_dir: str = option(MISSING, "Folder to write. It must not exist.")
    pictures: str | None = option(None, "Folder of named images. Default: emoji of Debian.")
    debian: str = option("/", "Folder that the Debian packages are unpacked in.")
    train_scenes: int = option(4_000, "Number of training scenes.")
    validation_scenes: int = option(300, "Number of validation scenes.")
    test_scenes: int = option(800, "Number of test scenes.")
    names: int = option(20, "Names that occur, in all splits.")
    side: int = option(112, "Height and width of the scenes in pixels.")
    seed: int = option(0, "Seed of the scenes.")


# Named images


class Picture(NamedTuple):
    """An image file, its name, and the box of its visible part."""

    path: str
    name: str
    visible: Box


def clean_name(text: str) -> str:
    """Return the words of a name, or `""` if it has none or too many: `"Fire_Engine (2)"` gives `"fire engine"`."""
    words = re.findall(r"[^\W_]+", text.lower())
    words = [word for word in words if word.isalpha() and len(word) > 1]
    return " ".join(words) if len(words) <= MAX_WORDS else ""


def hash_of(name: str) -> float:
    """Return a number in [0, 1)."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def write_emoji(font_file: Path, names_file: Path, folder: Path) -> Path:
    """Write the images of a color font for characters that have a short name in CLDR, and return their folder."""
    from fontTools.ttLib import TTFont

    font = TTFont(font_file)
    glyphs = font["CBDT"].strikeData[0]
    images = {}
    for code, glyph in font.getBestCmap().items():
        if glyph in glyphs:
            images[chr(code)] = glyphs[glyph].imageData
    folder.mkdir(parents=True)
    for node in ElementTree.parse(names_file).iterfind(".//annotation[@type='tts']"):
        character = node.get("cp")
        name = clean_name(node.text)
        if name and character in images:
            path = folder / f"{name} {ord(character):07}.png"
            path.write_bytes(images[character])
    return folder


def read_pictures(folder: str | Path) -> list[Picture]:
    """Read a folder of named images with its sub-folders, sorted by path. Unusable images are left out and counted."""
    pictures: list[Picture] = []
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    for path in tqdm(paths, desc="Reading"):
        name = clean_name(path.stem)
        visible = _visible_part(path)
        if name and visible:
            pictures.append(Picture(str(path), name, visible))
    print(f"{folder}: {len(paths) - len(pictures)} of {len(paths)} images have no name, or are unreadable or empty.")
    return pictures


def _visible_part(path: Path) -> Box | None:
    """Return the box of the pixels that are not transparent, or None for an unusable image."""
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGBA").getchannel("A").getbbox()
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return None


# Scenes


class Thing(NamedTuple):
    """A named image in a scene, and its box there."""

    picture: Picture
    box: Box

    @property
    def name(self) -> str:
        return self.picture.name

    @property
    def area(self) -> int:
        width = self.box[2] - self.box[0]
        height = self.box[3] - self.box[1]
        return width * height

    def center(self, axis: int) -> float:
        return (self.box[axis] + self.box[axis + 2]) / 2


def place_things(by_name: dict[str, list[Picture]], side: int, rng: random.Random) -> list[Thing]:
    """Return the objects of a scene with their boxes, the largest first. Objects that do not fit are left out."""
    num_things = min(rng.randint(*NUM_THINGS), len(by_name))
    names = rng.sample(sorted(by_name), num_things)
    if len(names) > 2 and rng.random() < 0.5:
        names[1] = names[0]  # two of a name
    largest = min(LARGEST, 1.1 / len(names) ** 0.5)
    sizes = [(rng.uniform(SMALLEST, largest), name) for name in names]
    sizes.sort(reverse=True)
    things: list[Thing] = []
    for share, name in sizes:
        picture = rng.choice(by_name[name])
        taken = [thing.box for thing in things]
        box = _free_box(picture, round(share * side), taken, side, rng)
        if box is not None:
            things.append(Thing(picture, box))
    return things


def _free_box(picture: Picture, longest: int, taken: list[Box], side: int, rng: random.Random) -> Box | None:
    x0, y0, x1, y1 = picture.visible
    while longest >= SMALLEST / 2 * side:
        scale = longest / max(x1 - x0, y1 - y0)
        width = max(1, round((x1 - x0) * scale))
        height = max(1, round((y1 - y0) * scale))
        for _ in range(NUM_TRIES):
            x = rng.randint(0, side - width)
            y = rng.randint(0, side - height)
            box = (x, y, x + width, y + height)
            if not any(_overlap(box, other) for other in taken):
                return box
        longest = int(longest * 0.8)
    return None


def _overlap(box: Box, other: Box) -> bool:
    in_columns = box[0] < other[2] and other[0] < box[2]
    in_rows = box[1] < other[3] and other[1] < box[3]
    return in_columns and in_rows


def render(things: Sequence[Thing], side: int, rng: random.Random) -> PIL.Image.Image:
    """Return a scene as an RGB image, half of them on a plain and half on a busy background."""
    if rng.random() < 0.5:
        color = tuple(rng.randint(128, 255) for _ in range(3))
        scene = PIL.Image.new("RGB", (side, side), color)
    else:
        scene = _busy_background(side, rng)
    for picture, (x0, y0, x1, y1) in things:
        with PIL.Image.open(picture.path) as image:
            visible = image.convert("RGBA").crop(picture.visible)
        thing = visible.resize((x1 - x0, y1 - y0), reducing_gap=2.0)
        scene.paste(thing, (x0, y0), thing)
    return scene


def _busy_background(side: int, rng: random.Random) -> PIL.Image.Image:
    """Return an image of blurred color with lines across it."""
    colors = rng.randbytes(6 * 6 * 3)
    background = PIL.Image.frombytes("RGB", (6, 6), colors).resize((side, side))
    draw = PIL.ImageDraw.Draw(background)
    for _ in range(12):
        ends = [rng.randint(0, side) for _ in range(4)]
        color = tuple(rng.randbytes(3))
        draw.line(ends, fill=color, width=max(1, side // 64))
    return background


# Texts


def expressions(things: Sequence[Thing], rng: random.Random) -> Iterator[tuple[str, str, Thing]]:
    """
    Yield expressions that each fit one object of a scene, as (kind, text, object): up to three unique names, both
    objects of one name if one is clearly larger, and the only object on one side of another.
    """
    single = _single(things)
    for thing in rng.sample(single, min(3, len(single))):
        yield "name", f"the {thing.name}", thing
    pair = [thing for thing in things if thing not in single]
    if len(pair) == 2:
        smaller, larger = sorted(pair, key=lambda thing: thing.area)
        if larger.area >= CLEARLY_LARGER * smaller.area:
            yield "size", f"the smaller {smaller.name}", smaller
            yield "size", f"the larger {larger.name}", larger
    beside = list(_beside(things, single))
    if beside:
        place, anchor, thing = rng.choice(beside)
        yield "place", f"what is {place} the {anchor.name}", thing


def _single(things: Sequence[Thing]) -> list[Thing]:
    times = Counter(thing.name for thing in things)
    return [thing for thing in things if times[thing.name] == 1]


def _beside(things: Sequence[Thing], single: list[Thing]) -> Iterator[tuple[str, Thing, Thing]]:
    """Yield a relation, a reference object with a unique name, and the only object in that relation."""
    for anchor in single:
        for place, (axis, sign) in PLACES.items():
            center = anchor.center(axis)
            there = [thing for thing in things if sign * (thing.center(axis) - center) > 0]
            if len(there) != 1 or there[0] not in single:
                continue
            (thing,) = there
            first, second = sorted((anchor, thing), key=lambda thing: thing.center(axis))
            if first.box[axis + 2] <= second.box[axis]:  # they do not overlap on the axis
                yield place, anchor, thing


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def questions(things: Sequence[Thing], names: Sequence[str], rng: random.Random) -> Iterator[dict]:
    """Yield questions with answers and regions: what is beside an object, and whether an object is there."""
    single = _single(things)
    beside = list(_beside(things, single))
    for place, anchor, thing in rng.sample(beside, min(3, len(beside))):
        yield {
            "question": f"what is {place} the {anchor.name}?",
            "answer": thing.name,
            "region": thing.box,
            "kind": "place",
        }
    for thing in rng.sample(single, min(1, len(single))):
        yield {
            "question": f"is there {with_article(thing.name)}?",
            "answer": "yes",
            "region": thing.box,
            "kind": "presence",
        }
    present = {thing.name for thing in things}
    absent = [name for name in names if name not in present]
    for name in rng.sample(absent, min(1, len(absent))):
        yield {"question": f"is there {with_article(name)}?", "answer": "no", "kind": "presence"}


def write_split(split: str, by_name: dict[str, list[Picture]], num_scenes: int, args: SceneArguments, folder: Path):
    """Write the scenes of a split, its questions to `SPLIT.jsonl` and its expressions to `SPLIT_boxes.jsonl`."""
    (folder / split).mkdir()
    rows = []
    boxes = []
    for number in tqdm(range(num_scenes), desc=f"Drawing {split}"):
        rng = random.Random(f"{args.seed} {split} {number}")
        things = place_things(by_name, args.side, rng)
        path = f"{split}/{number:05}.png"
        render(things, args.side, rng).save(folder / path)
        for row in questions(things, sorted(by_name), rng):
            rows.append({"image": path, **row})
        for kind, text, thing in expressions(things, rng):
            row = {
                "image": path,
                "expression": text,
                "box": thing.box,
                "kind": kind,
            }
            boxes.append(row)
    write_lines(folder / f"{split}.jsonl", rows)
    write_lines(folder / f"{split}_boxes.jsonl", boxes)


def write_lines(path: Path, rows: list[dict]):
    """Write a file of JSON lines."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None):
    (args,) = make_parser(SceneArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Give another --output_dir.")
    num_scenes = {
        "train": args.train_scenes,
        "validation": args.validation_scenes,
        "test": args.test_scenes,
    }
    with whole_folder(folder) as partial:
        partial.mkdir()
        source = args.pictures
        if source is None:
            debian = Path(args.debian)
            source = write_emoji(debian / FONT, debian / CHARACTER_NAMES, partial / "emoji")
        pictures = read_pictures(source)
        names = {picture.name for picture in pictures if hash_of(picture.name) >= SMALLEST_HASH}
        chosen = sorted(names, key=hash_of)[: args.names]
        by_name = defaultdict(list)
        for picture in pictures:
            if picture.name in chosen:
                by_name[picture.name].append(picture)
        if len(by_name) < 2:
            raise ValueError(f"Scenes need at least two names, got {len(by_name)}. Give more images.")
        for split, number in num_scenes.items():
            write_split(split, by_name, number, args, partial)


if __name__ == "__main__":
    run_script(main)
