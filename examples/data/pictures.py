"""Named images: reading of lists and folders, cleaning of names, and splits by name.

**Names.** In a file (JSONL, JSON, CSV, Parquet) each row has `image`, a path, and `name`. In a folder, which is
searched recursively, the name is the title in the image's metadata. If the title is missing or more than `MAX_SHARED`
images have the same title (it then names a collection), the name is the file name without words that begin a word of
the author in the metadata. Names are split at characters that are not letters and lower-cased. Words with digits,
single letters, articles at either end, and conjunctions such as "and" at the end are removed. Images whose name has no
words or more than `MAX_WORDS` are counted and left out of a folder; in a file they are bad rows.

**Copies.** The first of several files with equal content is used, and up to `MAX_PER_NAME` images of each name.

**Splits.** A hash of the name determines its split, with all images of that name. Names and images of the validation
and test splits therefore never occur in training.
"""

import functools
import hashlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from datasets.utils import tqdm

from trips_examples.data.colors import main_color
from trips_examples.data.faults import BadRowError, BadRows, Fault
from trips_examples.data.formats import read_records
from trips_examples.data.images import open_image
from trips_examples.data.tasks import filled_text


logger = logging.getLogger(__name__)

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
ARTICLES = {"a", "an", "the"}
LEADING_ON = {"and", "at", "by", "for", "from", "in", "of", "on", "or", "to", "with"}
MAX_WORDS = 4
MAX_SHARED = 3
MAX_PER_NAME = 5
MAX_LOADED = 4096  # images in memory, 50 kB each for scenes of 224 pixels
MAX_PIXELS = 16_000_000  # larger images take seconds to decode for each scene


@dataclass(frozen=True)
class NamedPicture:
    """
    An image file, its name, the box (x0, y0, x1, y1) in pixels of its visible part, and its color: one of `COLORS`, or
    `""` if it has several or was not examined.
    """

    path: str
    name: str
    visible: tuple[int, int, int, int]
    color: str = ""

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


def split_of(name: str, held_out: dict[str, float]) -> str:
    """
    Return the split of a name by its hash: a split in `held_out`, which maps splits to their share of names, or train.
    """
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
    for split, share in held_out.items():
        if place < share:
            return split
        place -= share
    return "train"


def read_pictures(
    sources: Sequence[str | Path], bad_rows: BadRows | None = None, with_colors: bool = False
) -> list[NamedPicture]:
    """
    Read lists and folders of named images. Each image is decoded once as a check.

    Args:
        sources (`Sequence[str]`): Files and folders. Paths in a file are relative to its folder.
        bad_rows ([`BadRows`], *optional*): Options for images that cannot be used. Default: they raise an error.
        with_colors (`bool`, *optional*, defaults to `False`): Whether to determine main colors. It doubles the time.

    Returns:
        `list[NamedPicture]`: In the order of the sources and their rows; in folders, sorted by path.

    Raises:
        `ValueError`: Images cannot be used (the message names the first few), or there are none.
        `FileNotFoundError`: A source does not exist.
    """
    bad_rows, seen, times = bad_rows or BadRows(), set(), Counter()
    pictures: list[NamedPicture] = []
    for source in map(Path, sources):
        rows, faults = _folder_rows(source) if source.is_dir() else list(_file_rows(source)), []
        for where, found in tqdm(rows, desc=f"Reading {source.name}", unit=" images"):
            try:
                if isinstance(found, BadRowError):
                    raise found
                path, name = found
                content = _digest(path)
                if content in seen or times[name] == MAX_PER_NAME:
                    continue
                pictures.append(NamedPicture(str(path), name, *_look(path, with_colors)))
                seen.add(content)
                times[name] += 1
            except BadRowError as error:
                faults.append(Fault(where, error.reason, error.detail))
        bad_rows.settle(faults, source.name, len(rows))
    if not pictures:
        raise ValueError(f"{', '.join(map(str, sources))} has no named images. Give another folder or list.")
    return pictures


# The source of a row, and the path and clean name of its image, or its error.
Row = tuple[str, tuple[Path, str] | BadRowError]


def _file_rows(file: Path) -> Iterator[Row]:
    for number, record in read_records(file):
        where = f"{file.name} row {number}"
        try:
            if isinstance(record, BadRowError):
                raise record
            path, given = file.parent / filled_text(record, "image"), filled_text(record, "name")
            name = clean_name(given)
            if not name:
                raise BadRowError(f"name without 1 to {MAX_WORDS} words", repr(given))
            yield where, (path, name)
        except BadRowError as error:
            yield where, error


def _folder_rows(folder: Path) -> list[Row]:
    """Return the rows of the images that have a name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    notes = {path: _metadata(path) for path in paths}
    shared = Counter(title for title, _ in notes.values())
    names = {path: clean_name(title) if shared[title] <= MAX_SHARED else "" for path, (title, _) in notes.items()}
    names = {path: name or clean_name(_without(path.stem, notes[path][1])) for path, name in names.items()}
    if nameless := [path for path, name in names.items() if not name]:
        logger.warning(f"{folder}: {len(nameless)} of {len(paths)} images have no name and are left out.")
    return [(str(path.relative_to(folder)), (path, name)) for path, name in names.items() if name]


def _metadata(path: Path) -> tuple[str, str]:
    """Return title and author in an image's metadata, or empty texts if it cannot be opened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as image:
                return str(image.info.get("Title", "")).strip(), str(image.info.get("Author", ""))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return "", ""


def _without(stem: str, author: str) -> str:
    """Return the words of a file name, without those that begin a word of the author's name."""
    names = re.findall(r"[^\W_]+", author.lower())
    words = re.findall(r"[^\W_]+", stem.lower())
    return " ".join(word for word in words if len(word) < 3 or not any(name.startswith(word) for name in names))


def _digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise BadRowError("missing image", str(path)) from error


def _look(path: Path, with_color: bool) -> tuple[tuple[int, int, int, int], str]:
    """Return the box of the pixels that are not transparent, and their main color if requested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with open_image(str(path)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRowError(f"more than {MAX_PIXELS:,} pixels", f"{path} has {image.width} x {image.height}")
            image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise BadRowError("image that is all transparent", str(path))
    return box, main_color(image.crop(box)) if with_color else ""


@functools.lru_cache(maxsize=MAX_LOADED)
def load_picture(picture: NamedPicture, longest_side: int) -> PIL.Image.Image:
    """Return the visible part of an image, RGBA, with sides of at most `longest_side` pixels."""
    with open_image(picture.path) as image:
        image = image.convert("RGBA").crop(picture.visible)
    scale = min(1.0, longest_side / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], PIL.Image.Resampling.BOX)
