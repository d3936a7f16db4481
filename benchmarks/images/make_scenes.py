r"""
Compose scenes of named images, with an expression for each of their objects, as image files and JSON lines.

    python benchmarks/images/make_scenes.py --output_dir drawn --seed 0 --train_scenes 14000
    python examples/run_grounding.py --train_file drawn/train.jsonl --validation_file drawn/validation.jsonl \
        --test_file drawn/test.jsonl ...

The images are those of `--pictures`, or Noto's emoji and openclipart's drawings of the Debian packages
fonts-noto-color-emoji, unicode-cldr-core and openclipart-png, below the folder `--debian`.

**Names.** The name of an image is the title in its metadata. If it has none, or more than `MAX_SHARED` images of a
folder have it (it then names a collection), it is the file name without words that begin a word of the author in the
metadata. Names are split at characters that are not letters and lower-cased. Words with digits, single letters,
articles at either end, and conjunctions at the end are removed. Images whose name has no word or more than `MAX_WORDS`
are left out and counted, as are images that cannot be read, are transparent or have too many pixels. The first of
several files of equal content is used, and up to `MAX_PER_NAME` images of a name.

**Splits.** A hash of the name determines its split, so names and images of the validation and test splits never occur
in training. Split, number and `--seed` determine a scene.
"""

import hashlib
import json
import random
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import PIL.ImageDraw
from tqdm.auto import tqdm

from modeling_trips.inspection.files import whole_folder
from trips_examples.training.parser import make_parser, run_script


FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CHARACTER_NAMES = "usr/share/unicode/cldr/common/annotations/en.xml"
DRAWINGS = "usr/share/openclipart/png"
# Folders of openclipart with objects, without flags, icons and patterns.
SUBJECTS = (
    "animals buildings containers decorations education electronics food office people plants recreation science "
    "tools transportation"
).split()

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
ARTICLES = {"a", "an", "the"}
LEADING_ON = {"and", "at", "by", "for", "from", "in", "of", "on", "or", "to", "with"}
MAX_WORDS = 4
MAX_SHARED = 3
MAX_PER_NAME = 5
MAX_PIXELS = 16_000_000
HELD_OUT = {"validation": 0.2, "test": 0.1}  # share of the names

NUM_THINGS = (2, 9)  # in a scene
SMALLEST, LARGEST = 0.14, 0.5  # longer side of an image, as a share of the scene's side
NUM_TRIES = 60  # attempts to find a free place before the image is made smaller
SHRINK = 0.8
REPEAT_PROBABILITY = 0.5  # probability that a scene has two or three images of one name
CLEARLY_LARGER = 1.7  # smallest ratio of areas
CLEARLY_BESIDE = 0.1  # smallest distance of centers, as a share of the scene's side
# The axis of each relation, and whether the object comes before its reference on that axis.
PLACES = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, x1 and y1 exclusive


@dataclass
class SceneArguments:
    output_dir: str = field(metadata={"help": "Folder to write. It must not exist."})
    pictures: list[str] | None = field(
        default=None, metadata={"help": "Folders of named images. Default: emoji and drawings of Debian."}
    )
    debian: str = field(default="/", metadata={"help": "Folder that the Debian packages are unpacked in."})
    train_scenes: int = field(default=14_000, metadata={"help": "Number of training scenes."})
    validation_scenes: int = field(default=300, metadata={"help": "Number of validation scenes."})
    test_scenes: int = field(default=800, metadata={"help": "Number of test scenes."})
    side: int = field(default=112, metadata={"help": "Height and width of the scenes in pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes."})


# Named images


class Picture(NamedTuple):
    """An image file, its name, and the box of its visible part."""

    path: str
    name: str
    visible: Box

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the visible part."""
        x0, y0, x1, y1 = self.visible
        return x1 - x0, y1 - y0


def clean_name(text: str) -> str:
    """
    Return the words of a name by the rule above, or `""` if it has none or too many.

    Example:

    >>> clean_name("The Fire_Engine (2)-v01")
    'fire engine'
    """
    words = [word for word in re.findall(r"[^\W_]+", text.lower()) if word.isalpha() and len(word) > 1]
    while words and words[0] in ARTICLES:
        del words[0]
    while words and words[-1] in LEADING_ON | ARTICLES:
        del words[-1]
    return " ".join(words) if len(words) <= MAX_WORDS else ""


def split_of(name: str) -> str:
    """Return the split of a name by its hash."""
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
    for split, share in HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def write_emoji(font_file: Path, names_file: Path, folder: Path) -> Path:
    """
    Write the images of a color font, such as Noto Color Emoji, for characters that have a short name in CLDR, and
    return their folder.

    Raises:
        `ValueError`: The font has no images.
    """
    from fontTools.ttLib import TTFont

    font = TTFont(font_file)
    if "CBDT" not in font:
        raise ValueError(f"{font_file} has no images (table CBDT). Give a color font such as Noto Color Emoji.")
    glyphs = font["CBDT"].strikeData[0]
    codes = {chr(code): glyphs[glyph].imageData for code, glyph in font.getBestCmap().items() if glyph in glyphs}
    folder.mkdir(parents=True)
    for node in ElementTree.parse(names_file).iterfind(".//annotation[@type='tts']"):
        character, name = node.get("cp"), clean_name(node.text)
        if name and character in codes:
            (folder / f"{name} {ord(character):07}.png").write_bytes(codes[character])
    return folder


def read_pictures(folders: Sequence[str | Path]) -> list[Picture]:
    """
    Read folders of named images with their sub-folders, sorted by path. Unusable images are left out and counted.

    Raises:
        `ValueError`: There are none.
    """
    pictures: list[Picture] = []
    seen, times = set(), Counter()
    for folder in map(Path, folders):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        notes = {path: _metadata(path) for path in paths}
        shared = Counter(title for title, _ in notes.values())
        unusable = 0
        for path in tqdm(paths, desc=f"Reading {folder.name}"):
            title, author = notes[path]
            name = clean_name(title) if shared[title] <= MAX_SHARED else ""
            name = name or clean_name(_without(path.stem, author))
            visible = _visible_part(path) if name else None
            if visible is None:
                unusable += 1
                continue
            content = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
            if content not in seen and times[name] < MAX_PER_NAME:
                pictures.append(Picture(str(path), name, visible))
                seen.add(content)
                times[name] += 1
        print(f"{folder}: {unusable} of {len(paths)} images are left out: without a name, unreadable or too large.")
    if not pictures:
        raise ValueError(f"{', '.join(map(str, folders))} has no named images. Give another folder.")
    return pictures


def _metadata(path: Path) -> tuple[str, str]:
    """Return title and author in an image's metadata, or empty texts if it cannot be opened."""
    try:
        with _opened(path) as image:
            return str(image.info.get("Title", "")).strip(), str(image.info.get("Author", ""))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return "", ""


def _without(stem: str, author: str) -> str:
    """Return the words of a file name, without those that begin a word of the author's name."""
    names = re.findall(r"[^\W_]+", author.lower())
    words = re.findall(r"[^\W_]+", stem.lower())
    return " ".join(word for word in words if len(word) < 3 or not any(name.startswith(word) for name in names))


def _opened(path: str | Path) -> PIL.Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(path)


def _visible_part(path: Path) -> Box | None:
    """Return the box of the pixels that are not transparent, or None for an unusable image."""
    try:
        with _opened(path) as image:
            return (
                image.convert("RGBA").getchannel("A").getbbox() if image.width * image.height <= MAX_PIXELS else None
            )
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
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


class SceneMaker:
    """
    Generator of the scenes of a split: several images of different sizes on a background, without overlap.

    Args:
        pictures (`Sequence[Picture]`): named images, with at least two names.
        split (`str`), seed (`int`): seed of the scenes, together with a scene's number.
        side (`int`): height and width of the scenes in pixels.
    """

    def __init__(self, pictures: Sequence[Picture], split: str, seed: int = 0, side: int = 112):
        self.split, self.seed, self.side = split, seed, side
        self.by_name = defaultdict(list)
        for picture in pictures:
            self.by_name[picture.name].append(picture)
        self.names = sorted(self.by_name)
        if len(self.names) < 2:
            raise ValueError(
                f"The {split} scenes need images of at least two names, got {len(self.names)}. Give more images."
            )

    def rng(self, number: int, purpose: str) -> random.Random:
        return random.Random(f"{self.seed} {self.split} {number} {purpose}")

    def things(self, number: int) -> list[Thing]:
        """Return the objects of a scene with their boxes, the largest first. Objects that do not fit are left out."""
        rng = self.rng(number, "layout")
        pictures = self._choose(rng)
        largest = min(LARGEST, 1.1 / len(pictures) ** 0.5)
        sides = [rng.uniform(SMALLEST, largest) for _ in pictures]
        things: list[Thing] = []
        for picture, side in sorted(zip(pictures, sides), key=lambda pair: -pair[1]):
            box = self._free_box(rng, picture, round(side * self.side), [thing.box for thing in things])
            if box is not None:
                things.append(Thing(picture, box))
        return things

    def _choose(self, rng: random.Random) -> list[Picture]:
        """Draw images with distinct names. Some scenes repeat one name."""
        names = rng.sample(self.names, min(rng.randint(*NUM_THINGS), len(self.names)))
        pictures = [rng.choice(self.by_name[name]) for name in names]
        if len(pictures) > 2 and rng.random() < REPEAT_PROBABILITY:
            for place in range(1, min(rng.choice((2, 3)), len(pictures) - 1)):
                pictures[place] = rng.choice(self.by_name[names[0]])
        return pictures

    def _free_box(self, rng: random.Random, picture: Picture, longest: int, taken: list[Box]) -> Box | None:
        while longest >= SMALLEST / 2 * self.side:
            width, height = (max(1, round(side * longest / max(picture.size))) for side in picture.size)
            for _ in range(NUM_TRIES):
                x, y = rng.randint(0, self.side - width), rng.randint(0, self.side - height)
                box = (x, y, x + width, y + height)
                if not any(_overlap(box, other) for other in taken):
                    return box
            longest = int(longest * SHRINK)
        return None

    def render(self, number: int) -> PIL.Image.Image:
        """Return a scene as an RGB image."""
        rng = self.rng(number, "background")
        scene = (_busy if rng.random() < 0.5 else _plain)(rng, self.side)
        for picture, (x0, y0, x1, y1) in self.things(number):
            with _opened(picture.path) as image:
                image = image.convert("RGBA").crop(picture.visible)
            scale = min(1.0, round(LARGEST * self.side) / max(image.size))
            smaller = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(smaller, PIL.Image.Resampling.BOX).resize((x1 - x0, y1 - y0))
            scene.paste(image, (x0, y0), image)
        return scene

    def expressions(self, number: int) -> Iterator[tuple[str, str, Box]]:
        """
        Yield expressions that each fit one object of a scene, as (kind, text, box): up to three unique names, both
        objects of one name if one is clearly larger, and the only object on one side of another.
        """
        yield from expressions(self.things(number), self.rng(number, "texts"))


def expressions(things: Sequence[Thing], rng: random.Random) -> Iterator[tuple[str, str, Box]]:
    times = Counter(thing.name for thing in things)
    single = [thing for thing in things if times[thing.name] == 1]
    for thing in rng.sample(single, min(3, len(single))):
        yield "name", f"the {thing.name}", thing.box
    pair = sorted((thing for thing in things if times[thing.name] == 2), key=lambda thing: thing.area)
    if len(pair) == 2 and pair[1].area >= CLEARLY_LARGER * pair[0].area:
        for thing, word in zip(pair, ("smaller", "larger")):
            yield "size", f"the {word} {thing.name}", thing.box
    if beside := list(_beside(things, single)):
        place, anchor, thing = rng.choice(beside)
        yield "place", f"what is {place} the {anchor.name}", thing.box


def _beside(things: Sequence[Thing], single: list[Thing]) -> Iterator[tuple[str, Thing, Thing]]:
    """Yield a relation, a reference object with a unique name, and the only object in that relation."""
    margin = CLEARLY_BESIDE * max(max(thing.box[2:]) for thing in things)  # of about the side of the scene
    for anchor in single:
        for place, (axis, is_before) in PLACES.items():
            distances = {thing: (thing.center[axis] - anchor.center[axis]) for thing in things if thing is not anchor}
            ahead = {thing: -far if is_before else far for thing, far in distances.items()}
            there = [thing for thing, far in ahead.items() if far > 0]
            if len(there) == 1 and ahead[there[0]] >= margin and there[0] in single:
                yield place, anchor, there[0]


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _color(rng: random.Random, darkest: int = 0) -> tuple[int, int, int]:
    red, green, blue = (rng.randint(darkest, 255) for _ in range(3))
    return red, green, blue


def _plain(rng: random.Random, side: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (side, side), _color(rng, darkest=128))


def _busy(rng: random.Random, side: int) -> PIL.Image.Image:
    """Draw clouds of colors, crossed by lines."""
    clouds = PIL.Image.frombytes("RGB", (6, 6), rng.randbytes(6 * 6 * 3))
    scene = clouds.resize((side, side), PIL.Image.Resampling.BICUBIC)
    draw = PIL.ImageDraw.Draw(scene)
    for _ in range(12):
        ends = [rng.randint(0, side) for _ in range(4)]
        draw.line(ends, fill=_color(rng), width=rng.randint(1, max(1, side // 64)))
    return scene


def write_split(maker: SceneMaker, number_of_scenes: int, folder: Path):
    """Write the scenes of a split to a folder, and their rows beside it."""
    (folder / maker.split).mkdir()
    with (folder / f"{maker.split}.jsonl").open("w", encoding="utf-8") as lines:
        for number in tqdm(range(number_of_scenes), desc=f"Drawing {maker.split}"):
            name = f"{maker.split}/{number:05}.png"
            maker.render(number).save(folder / name)
            for kind, text, box in maker.expressions(number):
                row = {"image": name, "expression": text, "box": box, "kind": kind}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None):
    (args,) = make_parser(SceneArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    if (folder := Path(args.output_dir)).exists():
        raise FileExistsError(f"{folder} exists. Give another --output_dir.")
    with whole_folder(folder) as partial:
        partial.mkdir()
        pictures = args.pictures
        if pictures is None:
            root = Path(args.debian)
            emoji = write_emoji(root / FONT, root / CHARACTER_NAMES, partial / "emoji")
            pictures = [emoji, *(root / DRAWINGS / subject for subject in SUBJECTS)]
        by_split = defaultdict(list)
        for picture in read_pictures(pictures):
            by_split[split_of(picture.name)].append(picture)
        for split in ("train", *HELD_OUT):
            maker = SceneMaker(by_split[split], split, args.seed, args.side)
            write_split(maker, getattr(args, f"{split}_scenes"), partial)


if __name__ == "__main__":
    run_script(main)
