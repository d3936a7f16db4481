"""
Image-text pairs as a stream, for data that are too many to load or to check before training: tar shards, files of
rows, data sets on the Hub.

A [`PairStream`] never ends: pass after pass it reads the shards in another order. Each process and each of its data
loader's workers reads shards of its own and shuffles their pairs block by block. What comes next is determined by the
seed and by a [`Position`] of six numbers, which every pair carries. A run that is resumed from the positions of its
last batch goes on with the very next pair, without reading again what it has seen (but for the current block).

Images are decoded as they leave the shuffled block, so that a block holds them compressed. A pair that cannot be used
stops the run. Where that is asked for it is skipped, counted, and named in `bad_pairs-*.jsonl`; too many of them stop
the run.
"""

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from modeling_trips import TripsProcessor
from trips_examples.data.faults import BadRowError
from trips_examples.data.images import decode_image, path_or_bytes
from trips_examples.data.shards import IMAGE_SUFFIXES, BadPair, FileShard, HubShard, TarShard
from trips_examples.data.tasks import caption_texts, filled_text, is_missing, list_of, text_of
from trips_examples.data.texts import check_length, count_tokens


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", *IMAGE_SUFFIXES, "image_path", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
ID_COLUMNS = ("image_id", "sha256", "md5", "url")
# Before so many pairs the share of bad ones is chance.
FEWEST_TO_JUDGE = 100

Shard = TarShard | FileShard | HubShard


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
    a file have them, and `position`, that of its reader behind the row. There is no end.

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
        processor (`TripsProcessor`, *optional*): the model's. Captions of which it makes no tokens or too many are
            bad, and so are images smaller than one of its patches.
        max_bad_share (`float`, *optional*, defaults to 0.0): bad pairs are skipped, and a larger share of them stops
            the run; at 0 the first one does.
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
        processor: TripsProcessor | None = None,
        max_bad_share: float = 0.0,
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
        self.processor, self.max_bad_share = processor, max_bad_share
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
        source, image_root = record["source"], record.get("image_root", "")
        columns = {name: value for name, value in record.items() if name not in ("source", "image_root")}
        try:
            caption = self._caption(columns, f"{pass_number}-{source}")
            encoded = encoded_image(columns, self.stream.image_columns)
            place = encoded if isinstance(encoded, bytes) else str(Path(image_root) / encoded)
            image = decode_image(place, 1 if self.stream.processor is None else self.stream.processor.patch_size)
            image_id = text_of(columns.get(_first_filled(columns, ID_COLUMNS)), "image_id")
        except BadRowError as error:
            return BadPair(source, str(error))
        default_id = source if isinstance(encoded, bytes) else encoded
        return {"image": image, "image_id": image_id or default_id, "caption": caption, "source": source}

    def _caption(self, columns: dict, seed: str) -> str:
        name = _first_filled(columns, self.stream.caption_columns)
        value = columns.get(name)
        captions = list_of(value, name) if name == "captions" else value if isinstance(value, list) else [value]
        texts = caption_texts(captions, columns)
        text = random.Random(f"{self.stream.seed}-{seed}").choice(texts)
        if (processor := self.stream.processor) is not None:
            tokenizer = processor.tokenizer
            (count,) = count_tokens(processor.clean_texts([text]), tokenizer)
            check_length(count, tokenizer.num_special_tokens_to_add(), tokenizer.model_max_length, "caption")
        return text

    def _note(self, pair: BadPair, position: Position):
        """Names a bad pair, and stops if there are too many."""
        if self._log is not None and position.pass_number == 0:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
        if self.stream.max_bad_share == 0:
            raise ValueError(f"{pair.source}: {pair.error}. Mend it, or skip such pairs with --skip_bad_rows.")
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


def _first_filled(columns: dict, names: Iterable[str]) -> str | None:
    return next((name for name in names if not is_missing(columns.get(name))), None)


def encoded_image(columns: dict, names: Iterable[str]) -> str | bytes:
    """The path or the encoded bytes of a record's image, which may be a dictionary with one of both."""
    image = path_or_bytes(columns.get(_first_filled(columns, names)))
    return image if isinstance(image, bytes) else filled_text({**columns, "image": image}, "image")
