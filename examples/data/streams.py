"""
Image-text pairs as a stream, for data that are too many to load or to check before training: tar shards, files of
rows, data sets on the Hub.

A [`PairStream`] never ends: pass after pass it reads the shards in another order. Each process and each of its data
loader's workers reads shards of its own and shuffles their pairs block by block. What comes next is determined by the
seed and by a [`Position`] of six numbers, which every pair carries. A run that is resumed from the positions of its
last batch goes on with the very next pair, without reading again what it has seen (but for the current block).

Images are decoded as they leave the shuffled block, so that a block holds them compressed. A pair that cannot be used
is skipped, counted, and named in `bad_pairs-*.jsonl`; too many of them stop the run.
"""

import io
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from modeling_trips import convert_to_rgb
from trips_examples.data.formats import BadRowError
from trips_examples.data.shards import IMAGE_SUFFIXES, BadPair, FileShard, HubShard, TarShard


logger = logging.getLogger(__name__)

Shard = TarShard | FileShard | HubShard

IMAGE_COLUMNS = ("image", *IMAGE_SUFFIXES, "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
ID_COLUMNS = ("image_id", "sha256", "md5", "url")
# Before so many pairs the share of bad ones is chance.
FEWEST_TO_JUDGE = 100


@dataclass(frozen=True)
class Position:
    """
    How far a reader is: `block_shard` and `block_record` say where its current block of records began (in its share
    of the shards of pass number `pass_number`), `offset` how many of the shuffled block have left it. `seen` and `bad`
    count records since the beginning of training.
    """

    pass_number: int = 0
    block_shard: int = 0
    block_record: int = 0
    offset: int = 0
    seen: int = 0
    bad: int = 0


class PairStream(TorchIterableDataset):
    """
    Yields rows with `image` (an RGB `PIL.Image`), `image_id`, `caption` and `source`, as the captions of
    `tasks.CAPTION_FEATURES` has them, and `position`, that of its reader behind the row. There is no end.

    A record has an image (a path, encoded bytes, or both as in Parquet files of the `datasets` library) and one or
    several captions, of which each pass takes one at random. Its `image_id`, or else `sha256`, `md5` or `url`, says
    which records are about the same image; without any, its path does, and images without a path are all distinct.

    Args:
        shards (`Sequence[Shard]`): see `find_shards` and `hub_shards`. With fewer shards than readers (processes times
            workers), each reader reads all of them and takes its share of the records.
        seed (`int`, *optional*, defaults to 0): of the order of shards and records, and of the choice of captions.
        buffer_size (`int`, *optional*, defaults to 1000): how many records are shuffled at a time, in each reader.
        process_index, num_processes (`int`, *optional*): of this process, among those that train.
        image_column, caption_column (`str`, *optional*): by default the first of `IMAGE_COLUMNS` and of
            `CAPTION_COLUMNS` that a record has.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): captions with more tokens than it allows are bad.
        max_bad_share (`float`, *optional*, defaults to 0.05): a larger share of bad pairs stops the run.
        log_folder (`str` or `Path`, *optional*): where bad pairs are named, in a file per reader, in the first pass.

    Raises:
        ValueError: while it is read, if there are too many bad pairs or no good one.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        seed: int = 0,
        buffer_size: int = 1000,
        process_index: int = 0,
        num_processes: int = 1,
        image_column: str | None = None,
        caption_column: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_bad_share: float = 0.05,
        log_folder: str | Path | None = None,
    ):
        if not shards:
            raise ValueError("A stream needs at least one shard.")
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {max_bad_share}.")
        self.shards, self.seed, self.buffer_size = list(shards), seed, buffer_size
        self.process_index, self.num_processes = process_index, num_processes
        self.image_columns = IMAGE_COLUMNS if image_column is None else (image_column,)
        self.caption_columns = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        self.tokenizer, self.max_bad_share = tokenizer, max_bad_share
        self.log_folder = None if log_folder is None else Path(log_folder)
        self.positions: list[Position] = []
        self.first_worker = 0

    def resume(self, positions: Sequence[Position], num_batches: int):
        """
        Goes on behind `num_batches` batches of this process.

        Args:
            positions (`Sequence[Position]`): of each worker of this process, behind its last batch. The number of
                processes and of workers must be what it was.
            num_batches (`int`): how many batches the workers made, in turns, since the beginning of training.
        """
        self.positions, self.first_worker = list(positions), num_batches % len(positions)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        num_workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if self.positions and len(self.positions) != num_workers:
            raise ValueError(
                f"The stream was read by {len(self.positions)} workers, and cannot go on with {num_workers}: give the "
                "--dataloader_num_workers that the run began with."
            )
        # A data loader takes its first batch from worker 0, but it may be another one's turn.
        number = (worker_id + self.first_worker) % num_workers
        position = self.positions[number] if self.positions else Position()
        reader = _Reader(self, self.process_index * num_workers + number, self.num_processes * num_workers)
        if reader.number == 0 and reader.count > len(self.shards):
            logger.warning(
                "%d readers (processes times --dataloader_num_workers) share %d shards: each reads all of them. More "
                "and smaller shards are faster.",
                reader.count,
                len(self.shards),
            )
        return reader.rows(position, number)


@dataclass
class _Reader:
    """One of the readers of a stream: reader `number` of `count`."""

    stream: PairStream
    number: int
    count: int

    def rows(self, position: Position, worker: int) -> Iterator[dict]:
        """Endless rows from a position on, each with the position behind it."""
        while True:
            for start, records in self._blocks(position):
                self._random(start.pass_number, start.block_shard, start.block_record).shuffle(records)
                for offset in range(start.offset, len(records)):
                    row = self._row(records[offset], start.pass_number)
                    is_bad = isinstance(row, BadPair)
                    position = replace(start, offset=offset + 1, seen=position.seen + 1, bad=position.bad + is_bad)
                    if isinstance(row, BadPair):
                        self._note(row, position)
                    else:
                        yield {**row, "position": (worker, position)}
            if position.seen == position.bad:
                raise ValueError(f"Reader {self.number} found no usable pair. {self._where_bad_ones_are()}")
            self._judge(position, fewest=1)
            position = Position(position.pass_number + 1, seen=position.seen, bad=position.bad)

    def _blocks(self, position: Position) -> Iterator[tuple[Position, list[dict | BadPair]]]:
        """The rest of a pass: blocks of records, and the positions that they begin at."""
        shards, is_shared = self._shards_of_pass(position.pass_number)
        start, records = position, []
        for shard in range(position.block_shard, len(shards)):
            first = position.block_record if shard == position.block_shard else 0
            for number, record in enumerate(islice(shards[shard], first, None), start=first):
                if not is_shared or number % self.count == self.number:
                    records.append(record)
                if len(records) == self.stream.buffer_size:
                    yield start, records
                    start = Position(position.pass_number, shard, number + 1)
                    records = []
        if records:
            yield start, records

    def _shards_of_pass(self, pass_number: int) -> tuple[list[Shard], bool]:
        """This reader's shards, and whether it shares them with the others."""
        shards = list(self.stream.shards)
        random.Random(f"{self.stream.seed}-{pass_number}").shuffle(shards)
        if len(shards) >= self.count:
            return shards[self.number :: self.count], False
        return shards, True

    def _random(self, *numbers: int) -> random.Random:
        return random.Random("-".join(map(str, (self.stream.seed, self.number, *numbers))))

    def _row(self, record: dict | BadPair, pass_number: int) -> dict | BadPair:
        """A record as a row of the stream, its image decoded, or what is wrong with it."""
        if isinstance(record, BadPair):
            return record
        try:
            caption = self._caption(record, pass_number)
            encoded = _value(record, self.stream.image_columns, "image")
            image = _decoded(encoded, record.get("image_root", ""))
        except BadRowError as error:
            return BadPair(record["source"], str(error))
        default_id = encoded if isinstance(encoded, str) else record["source"]
        image_id = next((str(record[name]) for name in ID_COLUMNS if record.get(name) is not None), default_id)
        return {"image": image, "image_id": image_id, "caption": caption, "source": record["source"]}

    def _caption(self, record: dict, pass_number: int) -> str:
        value = _value(record, self.stream.caption_columns, "caption")
        texts = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise BadRowError("caption is not text")
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise BadRowError("empty caption")
        text = random.Random(f"{self.stream.seed}-{pass_number}-{record['source']}").choice(texts)
        tokenizer = self.stream.tokenizer
        if tokenizer is not None and len(tokenizer(text)["input_ids"]) > tokenizer.model_max_length:
            raise BadRowError(f"caption of more than {tokenizer.model_max_length} tokens")
        return text

    def _note(self, pair: BadPair, position: Position):
        """Names a bad pair, and stops if there are too many."""
        if self._log is not None and position.pass_number == 0:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
        self._judge(position, fewest=FEWEST_TO_JUDGE)

    def _judge(self, position: Position, fewest: int):
        if position.seen >= fewest and position.bad > self.stream.max_bad_share * position.seen:
            raise ValueError(
                f"{position.bad} of the first {position.seen} pairs of reader {self.number} cannot be used, more than "
                f"--max_bad_share {self.stream.max_bad_share:g} allows. {self._where_bad_ones_are()}"
            )

    def _where_bad_ones_are(self) -> str:
        if self._log is None or not self._log.is_file():
            return ""
        with self._log.open(encoding="utf-8") as log:
            first = [json.loads(line) for line in islice(log, 3)]
        shown = "; ".join(f"{pair['source']}: {pair['error']}" for pair in first)
        return f"{self._log} names them, beginning with {shown}."

    @property
    def _log(self) -> Path | None:
        folder = self.stream.log_folder
        return None if folder is None else folder / f"bad_pairs-{self.number:05d}.jsonl"


def _value(record: dict, names: Iterable[str], what: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    columns = ", ".join(name for name in record if name not in ("source", "image_root"))
    raise BadRowError(f"no {what}", f"its columns are {columns}")


def _decoded(value: Any, image_root: str) -> PIL.Image.Image:
    """The image, upright and RGB, of a path, of encoded bytes, or of a dictionary with one of both."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, (str, bytes)):
        raise BadRowError("image is neither a path nor bytes")
    opened = io.BytesIO(value) if isinstance(value, bytes) else Path(image_root) / value
    try:
        with PIL.Image.open(opened) as image:
            return convert_to_rgb(image)
    except FileNotFoundError as error:
        raise BadRowError("missing image", str(opened)) from error
    except Exception as error:  # Pillow's plugins raise errors of many kinds on broken files
        raise BadRowError("unreadable image", str(error)) from error
