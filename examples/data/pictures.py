"""Pictures with names: lists and folders of them, read, named by a rule, and split by name.

**Names.** In a file (JSONL, JSON, CSV, Parquet) each row has `image`, a path, and `name`. In a folder, searched with
its sub-folders, a picture's name is the title in its own metadata, or, where it has none or more than `MAX_SHARED`
pictures have the same (it then names a collection), the name of its file without the words that begin those of the
author in its metadata. Either is cleaned: words are what stands between characters that are no letters, in lower case;
left out are words with digits, single letters, articles at either end, and words that lead on ("and") at the end. A
name of more than `MAX_WORDS` words, or of none, is none: in a folder such pictures are counted and left out, in a file
they are bad rows.

**Copies.** Of files with equal content the first counts. Of a name, `MAX_PER_NAME` pictures are used.

**Splits.** A name, with all of its pictures, is in one split: which one is decided by a hash of the name alone. So
what is tested was neither seen nor read in training, whatever else the list holds.
"""

import functools
import hashlib
import logging
import re
import warnings
from collections import Counter, defaultdict
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
MAX_LOADED = 4096  # pictures in memory, 50 kB each for scenes of 224 pixels
MAX_PIXELS = 16_000_000  # more take seconds to decode, each time that a scene shows them


@dataclass(frozen=True)
class NamedPicture:
    """
    A picture file, what it shows, the box (x0, y0, x1, y1) in pixels of what can be seen of it, and its color: one of
    `COLORS`, or `""` where it has several or was not looked at.
    """

    path: str
    name: str
    visible: tuple[int, int, int, int]
    color: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what can be seen."""
        x0, y0, x1, y1 = self.visible
        return x1 - x0, y1 - y0


def clean_name(text: str) -> str:
    """
    The words of a name by the rule above; `""` where it leaves none or too many.

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
    Return the split that has a name, by its hash: one in `held_out`, each with about its share of all names, or train.
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
    Reads lists and folders of named pictures. Each picture is decoded once, to see that it can be.

    Args:
        sources (`Sequence[str]`): Files and folders. Paths in a file are relative to its folder.
        bad_rows ([`BadRows`], *optional*): What becomes of pictures that cannot be used. Default: they are raised.
        with_colors (`bool`, *optional*, defaults to `False`): Whether to look at their colors, which takes about as
            long as the rest.

    Returns:
        `list[NamedPicture]`: In the order of the sources and files; of folders, by path.

    Raises:
        `ValueError`: Where pictures cannot be used, naming the first few, or there are none.
        `FileNotFoundError`: Where a source does not exist.
    """
    bad_rows, seen, times = bad_rows or BadRows(), set(), Counter()
    pictures: list[NamedPicture] = []
    for source in map(Path, sources):
        rows, faults = _folder_rows(source) if source.is_dir() else list(_file_rows(source)), []
        for where, found in tqdm(rows, desc=f"Reading {source.name}", unit=" pictures"):
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
        raise ValueError(f"There are no named pictures in {', '.join(map(str, sources))}: give a folder or a list.")
    return pictures


# Where a row is from, and the path of its picture with its clean name, or what is wrong with it.
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
    """Of the pictures that have a name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    notes = {path: _metadata(path) for path in paths}
    shared = Counter(title for title, _ in notes.values())
    names = {path: clean_name(title) if shared[title] <= MAX_SHARED else "" for path, (title, _) in notes.items()}
    names = {path: name or clean_name(_without(path.stem, notes[path][1])) for path, name in names.items()}
    if nameless := [path for path, name in names.items() if not name]:
        logger.warning(f"{folder}: {len(nameless)} of {len(paths)} pictures have no name and are left out.")
    return [(str(path.relative_to(folder)), (path, name)) for path, name in names.items() if name]


def _metadata(path: Path) -> tuple[str, str]:
    """The title and the author in a picture's metadata. One that cannot be opened has none; reading it says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as image:
                return str(image.info.get("Title", "")).strip(), str(image.info.get("Author", ""))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return "", ""


def _without(stem: str, author: str) -> str:
    """The words of a file name, but for those that begin a word of the author, as names of files are cut short."""
    names = re.findall(r"[^\W_]+", author.lower())
    words = re.findall(r"[^\W_]+", stem.lower())
    return " ".join(word for word in words if len(word) < 3 or not any(name.startswith(word) for name in names))


def _digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise BadRowError("missing image", str(path)) from error


def _look(path: Path, with_color: bool) -> tuple[tuple[int, int, int, int], str]:
    """The box of what is not transparent, and its color where that is asked for."""
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
    """What can be seen of a picture, RGBA, made smaller until no side is longer than `longest_side` pixels."""
    with open_image(picture.path) as image:
        image = image.convert("RGBA").crop(picture.visible)
    scale = min(1.0, longest_side / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], PIL.Image.Resampling.BOX)


def by_name(pictures: Sequence[NamedPicture]) -> dict[str, list[NamedPicture]]:
    """The pictures of each name, in order."""
    groups = defaultdict(list)
    for picture in pictures:
        groups[picture.name].append(picture)
    return dict(groups)
