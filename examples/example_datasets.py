"""Data sets in, one schema per task: files, the Hub, the easy-VQA of the PyPI package, and scenes made of its images.

Whatever the origin, visual question answering comes out as a `datasets.DatasetDict` whose splits, `train` and
`validation`, have the columns of `VQA_FEATURES`. Rows are checked where they are read, so that a bad one is reported
by file and row before any training starts. easy-VQA and its scenes are built in memory in seconds: no network, no
cache on disk. Also here: a WordPiece tokenizer trained on the questions, for runs without a pretrained one.
"""

import codecs
import csv
import functools
import io
import json
import logging
import random
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value, concatenate_datasets, load_dataset
from datasets.utils import tqdm
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer


logger = logging.getLogger(__name__)

# Columns of a VQA split, one row per question. `image`: decoded to an RGB `PIL.Image` when a row is read. `image_id`:
# equal for rows that share an image. `question_id`: the one given, or else the number of the row. `answers`: those of
# the annotators, one or several. `source`: where the row is from, as in "train.jsonl row 17".
VQA_FEATURES = Features(
    {
        "image": Image(mode="RGB"),
        "image_id": Value("string"),
        "question_id": Value("string"),
        "question": Value("string"),
        "answers": Sequence(Value("string")),
        "source": Value("string"),
    }
)

# And `target_box`: (x0, y0, x1, y1) in pixels of the tile asked about, x1 and y1 exclusive; None where the answer is
# that there is no such tile.
SCENE_FEATURES = Features({**VQA_FEATURES, "target_box": Sequence(Value("int32"))})

EASY_VQA_COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
EASY_VQA_SHAPES = {"circle", "rectangle", "triangle"}
# In larger scenes hardly any colour or shape is unique, so that there is next to nothing to ask.
MAX_GRID = 8

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class BadRowError(ValueError):
    """
    A row that cannot be used.

    Args:
        reason (`str`): What is wrong, in words that are the same for all rows with the same fault.
        detail (`str`, *optional*, defaults to `""`): The value at fault.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def load_vqa_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    image_root: str | Path | None = None,
    skip_bad_rows: bool = False,
    grid: int = 2,
    train_scenes: int = 4000,
    validation_scenes: int = 1000,
    seed: int = 0,
    cache_dir: str | None = None,
    token: str | None = None,
) -> DatasetDict:
    """
    Loads a data set for visual question answering.

    Args:
        dataset_name (`str`, *optional*):
            `"easy_vqa"`, also the default where no file is given: easy-VQA with its official split, whose test part
            is the split `validation`. `"easy_vqa_scenes"`: scenes made of its images, see `easy_vqa_scenes`. Any
            other name: a data set of the Hub with the splits `train` and `validation` and the columns `image`,
            `question` and `answers` or `answer`; only its texts are checked.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set of the Hub.
        train_file (`str` or `Path`, *optional*):
            JSON (a list of objects, or one object per line), JSONL, CSV or Parquet file, in UTF-8, with the columns
            `image` (a path), `question` and `answer` (one) or `answers` (a list; in CSV a JSON list or several
            separated by `|`; blank ones are dropped) and perhaps `image_id` and `question_id`. Rows count from 1: the
            lines of JSONL, the items of a JSON list, the records of CSV (without the header) and of Parquet.
        validation_file (`str` or `Path`, *optional*):
            As `train_file`. One of both is enough: the result then has that split only.
        image_root (`str` or `Path`, *optional*):
            Folder the paths of the images are relative to. Defaults to that of the file they are in.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether to skip the rows that cannot be used, with a warning that counts them, rather than to raise. Images
            are then decoded to the end, so that truncated ones are found too, and not only verified.
        grid (`int`, *optional*, defaults to 2):
            Tiles along each side of a scene, 1 to 8.
        train_scenes (`int`, *optional*, defaults to 4000):
            Number of scenes of the split `train`.
        validation_scenes (`int`, *optional*, defaults to 1000):
            Number of scenes of the split `validation`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the scenes.
        cache_dir (`str`, *optional*):
            Folder for data sets of the Hub. Defaults to that of the datasets library.
        token (`str`, *optional*):
            Access token for data sets of the Hub.

    Returns:
        `DatasetDict`: Splits with the columns of `VQA_FEATURES`, those of scenes of `SCENE_FEATURES`.

    Raises:
        `ValueError`: Where rows cannot be used, naming the first few, or where the arguments contradict each other.
        `FileNotFoundError`: Where a file or `image_root` does not exist.
        `ImportError`: Where easy-VQA is asked for and its package is missing.
    """
    files = {"train": train_file, "validation": validation_file}
    files = {split: Path(file) for split, file in files.items() if file is not None}
    if files and dataset_name is not None:
        raise ValueError(
            f"dataset_name is {dataset_name!r}, and there are files as well ({sorted(files)}): give one or the other."
        )
    if image_root is not None and not files:
        raise ValueError(f"image_root (is {str(image_root)!r}) goes with train_file or validation_file: give one.")
    if files:
        return DatasetDict({split: _vqa_file(file, image_root, skip_bad_rows) for split, file in files.items()})
    if dataset_name in (None, "easy_vqa"):
        return DatasetDict(train=_easy_vqa("train"), validation=_easy_vqa("test"))
    if dataset_name == "easy_vqa_scenes":
        return DatasetDict(
            train=easy_vqa_scenes("train", train_scenes, grid, seed),
            validation=easy_vqa_scenes("test", validation_scenes, grid, seed),
        )
    hub = load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir, token=token)
    if missing := {"train", "validation"} - hub.keys():
        raise ValueError(
            f"{dataset_name} has no split {sorted(missing)}, only {sorted(hub)}: choose another data set or "
            "configuration, or save its splits to files and give them as train_file and validation_file."
        )
    return DatasetDict(
        {split: _vqa_hub(hub[split], f"{dataset_name} {split}", skip_bad_rows) for split in ("train", "validation")}
    )


# Rows: one record in, one row of the schema out


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRowError(f"{column} is not text", reprlib.repr(value))
    return str(value).strip()


def _filled_text(record: dict, column: str) -> str:
    text = _text(record.get(column), column)
    if not text:
        raise BadRowError(f"no {column}", f"its columns are {', '.join(map(str, record))}")
    return text


def _answers_of_cell(cell: str) -> list:
    if not cell.lstrip().startswith("["):
        return [answer for answer in cell.split("|") if answer.strip()]
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise BadRowError("answers is not a JSON list", f"{reprlib.repr(cell)}: {error}") from error


def _answers(record: dict) -> list[str]:
    answers = record.get("answers")
    if isinstance(answers, str):
        answers = _answers_of_cell(answers)
    if not answers:
        answers = [record.get("answer")]
    if not isinstance(answers, list):
        raise BadRowError("answers is not a list", reprlib.repr(answers))
    # VQAv2 has a dict per annotator, with the confidence and the number of the annotator beside the answer.
    texts = [_text(each.get("answer") if isinstance(each, dict) else each, "an answer") for each in answers]
    texts = [text for text in texts if text]
    if not texts:
        raise BadRowError("no answer", f"its columns are {', '.join(map(str, record))}")
    return texts


def _vqa_texts(record: dict, source: str, number: int) -> dict:
    question_id = _text(record.get("question_id"), "question_id") or str(number)
    question = _filled_text(record, "question")
    return {"question_id": question_id, "question": question, "answers": _answers(record), "source": source}


def _good_rows(
    records: Iterable[tuple[int, dict | BadRowError]],
    make_row: Callable[[int, dict], dict],
    name: str,
    skip_bad_rows: bool,
) -> list[dict]:
    """Returns `make_row(number, record)` of each record; `BadRowError`s are raised, or counted and skipped, at the
    end. A record may be such an error already: a line that is no JSON."""
    rows, bad = [], []
    for number, record in tqdm(records, desc=f"Checking {name}", unit=" rows"):
        try:
            if isinstance(record, BadRowError):
                raise record
            rows.append(make_row(number, record))
        except BadRowError as error:
            bad.append((number, error))
    if bad and not skip_bad_rows:
        raise ValueError(_describe(bad, name, total=len(rows) + len(bad)))
    if bad:
        reasons = Counter(error.reason for _, error in bad)
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        logger.warning(f"Skipped {len(bad)} of the {len(rows) + len(bad)} rows of {name} ({counts}).")
    if not rows:
        raise ValueError(f"{name} has no row that can be used: it needs the columns image, question and answer.")
    return rows


def _describe(bad: list[tuple[int, BadRowError]], name: str, total: int, shown: int = 5) -> str:
    lines = [f"{len(bad)} of the {total} rows of {name} cannot be used:"]
    lines += [f"  {name} row {number}: {error}" for number, error in bad[:shown]]
    if len(bad) > shown:
        lines.append(f"  and {len(bad) - shown} more")
    return "\n".join([*lines, "Mend them, or leave them out with --skip_bad_rows."])


# Files


def _vqa_file(file: Path, image_root: str | Path | None, skip_bad_rows: bool) -> Dataset:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    folder = file.parent if image_root is None else Path(image_root)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: image_root is the one the images are in.")
    # Questions share images: each file is opened once.
    image_fault = functools.cache(functools.partial(_image_fault, decode=skip_bad_rows))
    path_of_id = {}

    def make_row(number: int, record: dict) -> dict:
        texts = _vqa_texts(record, f"{file.name} row {number}", number)
        path = folder / _filled_text(record, "image")
        if fault := image_fault(path):
            raise BadRowError(*fault)
        image_id = _text(record.get("image_id"), "image_id") or str(path)
        if path_of_id.setdefault(image_id, path) != path:
            raise BadRowError("image_id of two images", f"{image_id}: {path_of_id[image_id]} and {path}")
        return {"image": str(path), "image_id": image_id, **texts}

    rows = _good_rows(_read_records(file), make_row, file.name, skip_bad_rows)
    return Dataset.from_list(rows, features=VQA_FEATURES)


def _image_fault(path: Path, decode: bool) -> tuple[str, str] | None:
    try:
        with PIL.Image.open(path) as image:
            check = image.load if decode else image.verify
            check()
    except FileNotFoundError:
        return "missing image", str(path)
    # What else a broken file raises is up to the Pillow plugin of its format.
    except Exception as error:
        return "unreadable image", f"{path}: {error}"
    return None


def _read_records(file: Path) -> Iterator[tuple[int, dict | BadRowError]]:
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    if (suffix := file.suffix.lower()) not in readers:
        raise ValueError(f"{file} ends with {suffix!r}: convert it to one of {', '.join(readers)}.")
    try:
        yield from readers[suffix](file)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{file} is no valid {suffix} file: {error}. Mend or convert it.") from error


def _as_record(value: Any) -> dict | BadRowError:
    return value if isinstance(value, dict) else BadRowError("not a JSON object", reprlib.repr(value))


def _read_json(file: Path) -> Iterator[tuple[int, dict | BadRowError]]:
    content = file.read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_json_lines(file)
    return ((number, _as_record(value)) for number, value in enumerate(json.loads(content), start=1))


def _read_json_lines(file: Path) -> Iterator[tuple[int, dict | BadRowError]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, _as_record(json.loads(line))
            except json.JSONDecodeError as error:
                yield number, BadRowError("broken JSON", f"{error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                yield number, BadRowError("not UTF-8", str(error))


def _read_csv(file: Path) -> Iterator[tuple[int, dict | BadRowError]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), start=1):
            if surplus := record.get(None):
                yield number, BadRowError("more cells than the header", f"{surplus}: quote cells that have commas")
            else:
                yield number, record


def _read_parquet(file: Path) -> Iterator[tuple[int, dict | BadRowError]]:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from enumerate((row for batch in table.iter_batches() for row in batch.to_pylist()), start=1)


# The Hub


def _vqa_hub(dataset: Dataset, name: str, skip_bad_rows: bool) -> Dataset:
    if missing := {"image", "question"} - set(dataset.column_names):
        raise ValueError(f"{name} has no columns {sorted(missing)}, only {dataset.column_names}: rename them.")

    def make_row(number: int, record: dict) -> dict:
        image_id = _text(record.get("image_id"), "image_id") or str(number)
        return {"index": number - 1, "image_id": image_id, **_vqa_texts(record, f"{name} row {number}", number)}

    # The images stay where they are: only the texts are read.
    usable = {*VQA_FEATURES, "answer"} - {"image"}
    text_columns = [column for column in dataset.column_names if column in usable]
    records = enumerate(dataset.select_columns(text_columns), start=1)
    rows = _good_rows(records, make_row, name, skip_bad_rows)
    images = dataset.select_columns("image").select([row.pop("index") for row in rows])
    images = images.cast_column("image", VQA_FEATURES["image"])
    text_features = Features({column: VQA_FEATURES[column] for column in VQA_FEATURES if column != "image"})
    return concatenate_datasets([images, Dataset.from_list(rows, features=text_features)], axis=1)


# easy-VQA


class _EasyVqaSplit(NamedTuple):
    questions: list[str]
    answers: list[str]
    image_ids: list[int]
    image_paths: dict[int, str]


def _read_easy_vqa(split: str) -> _EasyVqaSplit:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "The data set easy-VQA is in the package easy-vqa, which is not installed: `pip install easy-vqa`."
        ) from error
    if split == "train":
        return _EasyVqaSplit(*easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    return _EasyVqaSplit(*easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())


def _easy_vqa(split: str) -> Dataset:
    data = _read_easy_vqa(split)
    numbers = range(1, len(data.questions) + 1)
    columns = {
        "image": [data.image_paths[image_id] for image_id in data.image_ids],
        "image_id": [f"{split} {image_id}" for image_id in data.image_ids],
        "question_id": [str(number) for number in numbers],
        "question": data.questions,
        "answers": [[answer] for answer in data.answers],
        "source": [f"easy_vqa {split} row {number}" for number in numbers],
    }
    return Dataset.from_dict(columns, features=VQA_FEATURES)


def easy_vqa_attributes(split: str) -> dict[int, tuple[str, str]]:
    """
    Recovers what the images of easy-VQA show from their own questions and answers.

    A yes or no question about "no" or "not" is read as its opposite. Of the official images, about one in ten has too
    few questions to tell both its colour and its shape: it is left out.

    Args:
        split (`str`): `"train"` or `"test"`.

    Returns:
        `dict[int, tuple[str, str]]`: The colour and the shape by number of image, in ascending order.

    Raises:
        `ValueError`: Where the questions about an image contradict each other.
    """
    data = _read_easy_vqa(split)
    left = dict.fromkeys(sorted(data.image_paths), (EASY_VQA_COLORS, EASY_VQA_SHAPES))
    for question, answer, image_id in zip(data.questions, data.answers, data.image_ids, strict=True):
        words = set(re.findall(r"\w+", question))
        denied = (answer == "no") != bool(words & {"no", "not"})
        left[image_id] = tuple(_narrow(names, words | {answer}, denied) for names in left[image_id])
        if not all(left[image_id]):
            raise ValueError(
                f"The questions about the {split} image {image_id} of easy-VQA contradict each other, at the latest "
                f"in {question!r} with the answer {answer!r}: install the package easy-vqa anew."
            )
    return {
        image_id: (*colors, *shapes) for image_id, (colors, shapes) in left.items() if len(colors) == len(shapes) == 1
    }


def _narrow(names: set[str], words: set[str], denied: bool) -> set[str]:
    if not names & words:
        return names
    return names - words if denied else names & words


# Scenes


def easy_vqa_scenes(split: str, num_scenes: int, grid: int = 2, seed: int = 0) -> Dataset:
    """
    Makes scenes of `grid` x `grid` images of easy-VQA, with questions each about one of them: the one the text names.

    A scene has a question for each colour and each shape that only one of its tiles has ("what shape is the red
    shape?", "what color is the circle?"), and one pair about presence, as often "yes" as "no" ("is there a red
    circle?"). Whatever is said to be absent has a colour that is in the scene, so that colour and shape have to be
    seen together. The first scenes are the same however many are made. Images whose colour and shape easy-VQA does not
    tell are not used, see `easy_vqa_attributes`.

    Args:
        split (`str`): `"train"` or `"test"`: the part of easy-VQA all tiles are from.
        num_scenes (`int`): Number of scenes, at least 1.
        grid (`int`, *optional*, defaults to 2): Tiles of 64 x 64 pixels along each side, 1 to 8.
        seed (`int`, *optional*, defaults to 0): Seed of the choice of tiles and questions, mixed with the split.

    Returns:
        `Dataset`: One row per question with the columns of `SCENE_FEATURES`, about six rows per scene for `grid=2`.

    Raises:
        `ValueError`: Where `grid` or `num_scenes` is out of its range.
    """
    if not 1 <= grid <= MAX_GRID:
        raise ValueError(f"grid is {grid}: choose 1 to {MAX_GRID} tiles along each side of a scene.")
    if num_scenes < 1:
        raise ValueError(f"The number of {split} scenes is {num_scenes}: choose at least 1.")
    rng = random.Random(f"{seed} {split}")
    paths = _read_easy_vqa(split).image_paths
    attributes = easy_vqa_attributes(split)
    tiles = {image_id: PIL.Image.open(paths[image_id]).convert("RGB") for image_id in attributes}
    rows = []
    for scene in range(1, num_scenes + 1):
        chosen = rng.sample(list(tiles), grid * grid)
        image, boxes = _tiled([tiles[image_id] for image_id in chosen], grid)
        for question, answer, cell in _scene_questions([attributes[image_id] for image_id in chosen], rng):
            number = len(rows) + 1
            rows.append(
                {
                    "image": image,
                    "image_id": f"{split} scene {scene}",
                    "question_id": str(number),
                    "question": question,
                    "answers": [answer],
                    "source": f"easy_vqa_scenes {split} row {number}",
                    "target_box": None if cell is None else boxes[cell],
                }
            )
    return Dataset.from_list(rows, features=SCENE_FEATURES)


def _tiled(tiles: list[PIL.Image.Image], grid: int) -> tuple[dict, list[tuple[int, int, int, int]]]:
    """Returns the scene, encoded as `datasets.Image` takes it, and the box of each tile, row by row."""
    width, height = tiles[0].size
    scene = PIL.Image.new("RGB", (grid * width, grid * height))
    boxes = []
    for cell, tile in enumerate(tiles):
        x0, y0 = cell % grid * width, cell // grid * height
        boxes.append((x0, y0, x0 + width, y0 + height))
        scene.paste(tile, boxes[-1])
    png = io.BytesIO()
    scene.save(png, "PNG", compress_level=1)
    return {"bytes": png.getvalue(), "path": None}, boxes


def _scene_questions(tiles: list[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, str, int | None]]:
    """Yields each question, its answer and the cell it is about, of tiles given by colour and shape."""
    times = Counter(name for tile in tiles for name in (*tile, tile))
    for cell, (color, shape) in enumerate(tiles):
        if times[color] == 1:
            yield f"what shape is the {color} shape?", shape, cell
        if times[shape] == 1:
            yield f"what color is the {shape}?", color, cell
    present = [cell for cell, tile in enumerate(tiles) if times[tile] == 1]
    colors = {color for color, _ in tiles}
    absent = sorted({(color, shape) for color in colors for shape in EASY_VQA_SHAPES} - set(tiles))
    if present and absent:
        cell = rng.choice(present)
        yield f"is there a {' '.join(tiles[cell])}?", "yes", cell
        yield f"is there a {' '.join(rng.choice(absent))}?", "no", None


# Tokenizer


def train_wordpiece_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> BertTokenizer:
    """
    Trains a lower-casing WordPiece tokenizer as BERT's on texts; the same texts always give the same vocabulary.

    Args:
        texts (`Iterable[str]`):
            The texts, such as the questions of a data set.
        vocab_size (`int`, *optional*, defaults to 1000):
            Size of the vocabulary at most, though never fewer than the special tokens, `[PAD]` (id 0), `[UNK]`,
            `[CLS]`, `[SEP]` and `[MASK]`, and twice the characters of the texts: at the start of a word and within.

    Returns:
        `BertTokenizer`: It makes `[CLS] ... [SEP]` of a text, and saves and loads as any other tokenizer.

    Raises:
        `ValueError`: Where the texts have no characters to learn from.
    """
    texts = list(texts)
    backend = BertTokenizer().backend_tokenizer
    alphabet = sorted(
        {
            character
            for text in texts
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
            for character in word
        }
    )
    if not alphabet:
        raise ValueError(f"A tokenizer cannot be trained on {len(texts)} texts without a character: give it texts.")
    # The trainer numbers the characters within words in the order of a hash map, another one each run, and breaks ties
    # by these numbers. Given as special tokens they have theirs before it starts.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{character}" for character in alphabet],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False))
