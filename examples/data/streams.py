"""
Image-text pairs as a stream, for data that is too large to load or to check before training: tar shards, files of
rows, data sets on the Hub.

A [`PairStream`] is endless. Each pass reads the shards in another order. Each worker of a data loader reads its own
shards and shuffles their pairs block by block. The seed and a [`Position`] of six numbers determine the next pair.
torchdata's `StatefulDataLoader` saves the positions of all workers, so that a resumed run continues with the next pair
and only reads the current block again. (`datasets.IterableDataset` loses its shuffle buffer when it resumes, and with
`split_dataset_by_node` all processes read all shards if these do not divide evenly.)

Images are decoded after shuffling, so that a block holds compressed images. A bad pair stops the run, or is skipped,
counted, and logged in `bad_pairs-*.jsonl`. Too many bad pairs stop the run.
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
from trips_examples.data.checking import check_length
from trips_examples.data.images import decode_image, path_or_bytes
from trips_examples.data.shards import IMAGE_SUFFIXES, FileShard, HubShard, TarShard
from trips_examples.data.tasks import BadRowError, Fault, caption_texts, filled_text, is_missing, list_of, text_of


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", *IMAGE_SUFFIXES, "image_path", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
ID_COLUMNS = ("image_id", "sha256", "md5", "url")
FEWEST_TO_JUDGE = 100  # pairs before the share of bad pairs is checked

Shard = TarShard | FileShard | HubShard


@dataclass(frozen=True)
class Position:
    """
    Position of a reader. Its current block begins at `block_record` of shard `block_shard` (among its shards of pass
    `pass_number`), and `offset` records of the shuffled block were read. `seen` and `bad` count records since the
    beginning of training.
    """

    pass_number: int = 0
    block_shard: int = 0
    block_record: int = 0
    offset: int = 0
    seen: int = 0
    bad: int = 0


class PairStream(TorchIterableDataset):
    """
    Endless stream of rows with `image` (an RGB `PIL.Image`), `image_id`, `caption` and `source`.

    A record has an image (a path, encoded bytes, or both as in Parquet files of the `datasets` library) and one or
    more captions. Each pass draws one of them. `image_id`, or else `sha256`, `md5`, `url` or the path, identifies the
    image. Images without any of these are distinct.

    Args:
        shards (`Sequence[Shard]`): see `find_shards` and `hub_shards`. With fewer shards than readers (processes times
            workers), each reader reads all of them and takes its share of the records.
        seed (`int`, *optional*, defaults to 0): seed of the order of shards and records, and of the captions.
        buffer_size (`int`, *optional*, defaults to 1000): number of records in a shuffled block of a reader.
        process_index, num_processes (`int`, *optional*): rank and number of training processes.
        image_column, caption_column (`str`, *optional*): by default the first of `IMAGE_COLUMNS` and of
            `CAPTION_COLUMNS` that a record has.
        processor (`TripsProcessor`, *optional*): the model's processor. Captions with no tokens or too many are bad,
            and so are images smaller than a patch.
        max_bad_share (`float`, *optional*, defaults to 0.0): largest share of bad pairs, which are skipped. With 0,
            the first bad pair stops the run.
        log_folder (`str` or `Path`, *optional*): folder for the bad pairs of the first pass, one file per reader.

    Raises:
        ValueError: Raised by iteration, if there are too many bad pairs or no good pair.
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
            raise ValueError("A stream needs at least one of `shards`.")
        if buffer_size < 1:
            raise ValueError(f"`buffer_size` must be at least 1, got {buffer_size}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"`max_bad_share` must be in [0, 1], got {max_bad_share}.")
        self.shards, self.seed, self.buffer_size = list(shards), seed, buffer_size
        self.process_index, self.num_processes = process_index, num_processes
        self.image_columns = IMAGE_COLUMNS if image_column is None else (image_column,)
        self.caption_columns = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        self.processor, self.max_bad_share = processor, max_bad_share
        self.log_folder = None if log_folder is None else Path(log_folder)
        self.position = Position()
        self.reader, self.num_readers = process_index, num_processes

    def state_dict(self) -> dict[str, int]:
        return asdict(self.position)

    def load_state_dict(self, state: dict[str, int]):
        self.position = Position(**state)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        num_workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        self.reader = self.process_index * num_workers + worker_id
        self.num_readers = self.num_processes * num_workers
        if self.reader == 0 and self.num_readers > len(self.shards):
            logger.warning(
                "%d readers (processes times --dataloader_num_workers) share %d shards, and each reads all of them. "
                "More and smaller shards are faster.",
                self.num_readers,
                len(self.shards),
            )
        return self._rows()

    def _rows(self) -> Iterator[dict]:
        while True:
            for start, records in self._blocks(self.position):
                self._random(start.pass_number, start.block_shard, start.block_record).shuffle(records)
                for offset in range(start.offset, len(records)):
                    row = self._row(records[offset], start.pass_number)
                    seen, bad = self.position.seen + 1, self.position.bad + isinstance(row, Fault)
                    self.position = replace(start, offset=offset + 1, seen=seen, bad=bad)
                    if isinstance(row, Fault):
                        self._note(row)
                    else:
                        yield row
            if self.position.seen == self.position.bad:
                raise ValueError(f"Reader {self.reader} found no usable pair. {self._where_bad_ones_are()}")
            self._judge(fewest=1)
            self.position = Position(self.position.pass_number + 1, seen=self.position.seen, bad=self.position.bad)

    def _blocks(self, position: Position) -> Iterator[tuple[Position, list[dict | Fault]]]:
        """Yield the remaining blocks of a pass: their positions and records."""
        shards, is_shared = self._shards_of_pass(position.pass_number)
        start, records = position, []
        for shard in range(position.block_shard, len(shards)):
            first = position.block_record if shard == position.block_shard else 0
            for number, record in enumerate(islice(shards[shard], first, None), start=first):
                if not is_shared or number % self.num_readers == self.reader:
                    records.append(record)
                if len(records) == self.buffer_size:
                    yield start, records
                    start = Position(position.pass_number, shard, number + 1)
                    records = []
        if records:
            yield start, records

    def _shards_of_pass(self, pass_number: int) -> tuple[list[Shard], bool]:
        """Return the shards of this reader, and whether it shares them with other readers."""
        shards = list(self.shards)
        random.Random(f"{self.seed}-{pass_number}").shuffle(shards)
        if len(shards) >= self.num_readers:
            return shards[self.reader :: self.num_readers], False
        return shards, True

    def _random(self, *numbers: int) -> random.Random:
        return random.Random("-".join(map(str, (self.seed, self.reader, *numbers))))

    def _row(self, record: dict | Fault, pass_number: int) -> dict | Fault:
        """Return a record as a row with its decoded image, or its fault."""
        if isinstance(record, Fault):
            return record
        source, image_root = record["source"], record.get("image_root", "")
        columns = {name: value for name, value in record.items() if name not in ("source", "image_root")}
        try:
            caption = self._caption(columns, f"{pass_number}-{source}")
            encoded = encoded_image(columns, self.image_columns)
            place = encoded if isinstance(encoded, bytes) else str(Path(image_root) / encoded)
            image = decode_image(place, 1 if self.processor is None else self.processor.patch_size)
            image_id = text_of(columns.get(_first_filled(columns, ID_COLUMNS)), "image_id")
        except BadRowError as error:
            return Fault(source, error.reason, error.detail)
        default_id = source if isinstance(encoded, bytes) else encoded
        return {"image": image, "image_id": image_id or default_id, "caption": caption, "source": source}

    def _caption(self, columns: dict, seed: str) -> str:
        name = _first_filled(columns, self.caption_columns)
        value = columns.get(name)
        captions = list_of(value, name) if name == "captions" else value if isinstance(value, list) else [value]
        texts = caption_texts(captions, columns)
        text = random.Random(f"{self.seed}-{seed}").choice(texts)
        if (processor := self.processor) is not None:
            tokenizer = processor.tokenizer
            (tokens,) = tokenizer(processor.clean_texts([text]), add_special_tokens=False, verbose=False)["input_ids"]
            check_length(len(tokens), processor, "caption", tokenizer.num_special_tokens_to_add())
        return text

    def _note(self, fault: Fault):
        """Log a bad pair, and stop if there are too many."""
        if self._log is not None and self.position.pass_number == 0:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"source": fault.source, "error": fault.error}, ensure_ascii=False) + "\n")
        if self.max_bad_share == 0:
            raise ValueError(f"{fault}. Repair it, or skip such pairs with --skip_bad_rows.")
        self._judge(fewest=FEWEST_TO_JUDGE)

    def _judge(self, fewest: int):
        position = self.position
        if position.seen >= fewest and position.bad > self.max_bad_share * position.seen:
            raise ValueError(
                f"{position.bad} of the first {position.seen} pairs of reader {self.reader} cannot be used, more than "
                f"--max_bad_share {self.max_bad_share:g} allows. {self._where_bad_ones_are()}"
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
        return None if self.log_folder is None else self.log_folder / f"bad_pairs-{self.reader:05d}.jsonl"


def _first_filled(columns: dict, names: Iterable[str]) -> str | None:
    return next((name for name in names if not is_missing(columns.get(name))), None)


def encoded_image(columns: dict, names: Iterable[str]) -> str | bytes:
    """Return the path or the encoded bytes of a record's image, which may be a dictionary with either."""
    image = path_or_bytes(columns.get(_first_filled(columns, names)))
    return image if isinstance(image, bytes) else filled_text({**columns, "image": image}, "image")
