r"""
Put named images side by side on cards, with questions that people ask, as image files and JSON lines without regions.

    apt-get download tuxpaint-stamps-default
    dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python benchmarks/images/make_cards.py --pictures stamps/usr/share/tuxpaint/stamps/animals --output_dir cards
    python examples/run_vqa.py --train_file cards/train.jsonl --validation_file cards/validation.jsonl ...

One to four images of different names stand in a row. Questions: what is on the left, what is on the right, how many
things are there, is there one of a name, what color is the card. All splits share `--names` names.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
from make_scenes import Picture, hash_of, read_pictures, with_article, write_lines
from tqdm.auto import tqdm

from modeling_trips.inspection.files import whole_folder
from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


COLORS = {"red": (220, 90, 90), "green": (90, 190, 100), "blue": (120, 160, 240), "yellow": (240, 220, 100)}
COUNTS = ("one", "two", "three", "four")
MARGIN = 4  # pixels around a thing


@dataclass
class CardArguments:
    output_dir: str = field(metadata={"help": "Folder to write. It must not exist."})
    pictures: str = field(metadata={"help": "Folder of named images, with its sub-folders."})
    train_cards: int = option(2_000, "Number of training cards.")
    validation_cards: int = option(150, "Number of validation cards.")
    test_cards: int = option(500, "Number of test cards.")
    names: int = option(20, "Names that occur, in all splits.")
    side: int = option(112, "Height and width of the cards in pixels.")
    seed: int = option(0, "Seed of the cards.")


def draw_card(pictures: Sequence[Picture], color: str, side: int, rng: random.Random) -> PIL.Image.Image:
    """Return a card with pictures from left to right, each somewhere in a column of its own."""
    card = PIL.Image.new("RGB", (side, side), COLORS[color])
    column_width = side // len(pictures)
    longest = min(column_width, side // 2) - 2 * MARGIN
    for column, picture in enumerate(pictures):
        with PIL.Image.open(picture.path) as image:
            thing = image.convert("RGBA").crop(picture.visible)
        thing.thumbnail((longest, longest))
        x = column * column_width + rng.randint(0, column_width - thing.width)
        y = rng.randint(0, side - thing.height)
        card.paste(thing, (x, y), thing)
    return card


def questions(shown: Sequence[str], color: str, names: Sequence[str], rng: random.Random) -> Iterator[dict]:
    """Yield the questions about a card that shows things of these names, from left to right."""

    def row(question: str, answer: str, kind: str) -> dict:
        return {"question": question, "answer": answer, "kind": kind}

    if len(shown) > 1:
        yield row("what is on the left?", shown[0], "side")
        yield row("what is on the right?", shown[-1], "side")
    number = COUNTS[len(shown) - 1]
    yield row("how many things are there?", number, "count")
    absent = [name for name in names if name not in shown]
    present = rng.choice(shown)
    yield row(f"is there {with_article(present)}?", "yes", "presence")
    missing = rng.choice(absent)
    yield row(f"is there {with_article(missing)}?", "no", "presence")
    yield row("what color is the card?", color, "color")


def write_split(split: str, by_name: dict[str, list[Picture]], num_cards: int, args: CardArguments, folder: Path):
    """Write the cards of a split, and its questions to `SPLIT.jsonl`."""
    (folder / split).mkdir()
    names = sorted(by_name)
    rows = []
    for number in tqdm(range(num_cards), desc=f"Drawing {split}"):
        rng = random.Random(f"{args.seed} {split} {number}")
        shown = rng.sample(names, rng.randint(1, len(COUNTS)))
        color = rng.choice(sorted(COLORS))
        pictures = [rng.choice(by_name[name]) for name in shown]
        path = f"{split}/{number:05}.png"
        draw_card(pictures, color, args.side, rng).save(folder / path)
        for row in questions(shown, color, names, rng):
            rows.append({"image": path, **row})
    write_lines(folder / f"{split}.jsonl", rows)


def main(argv: list[str] | None = None):
    (args,) = make_parser(CardArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Give another --output_dir.")
    by_name = defaultdict(list)
    for picture in read_pictures(args.pictures):
        by_name[picture.name].append(picture)
    if len(by_name) <= len(COUNTS):
        raise ValueError(
            f"Cards need images of at least {len(COUNTS) + 1} names, got {len(by_name)}. Give more images."
        )
    chosen = sorted(by_name, key=hash_of)[: args.names]
    pictures = {name: by_name[name] for name in chosen}
    num_cards = {
        "train": args.train_cards,
        "validation": args.validation_cards,
        "test": args.test_cards,
    }
    with whole_folder(folder) as partial:
        partial.mkdir()
        for split, number in num_cards.items():
            write_split(split, pictures, number, args, partial)


if __name__ == "__main__":
    run_script(main)
