"""
Image-text pairs as a stream, for data that is too large to load or to check before training: tar shards, files of
rows, data sets on the Hub. A shard yields records, or faults in their place, in a fixed order.
"""

import glob
import json
import random
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from modeling_trips import TripsProcessor
from trips_examples.data.images import decode_image, path_or_bytes, without_decoding
from trips_examples.data.loading import check_length
from trips_examples.data.printing import printable
from trips_examples.data.records import IMAGE_SUFFIXES, parsed_record, read_records
from trips_examples.data.tasks import (
    BadRowError,
    Fault,
    caption_texts,
    filled_text,
    is_missing,
    one_or_several,
    text_of,
)


IMAGE_COLUMNS = ("image", *IMAGE_SUFFIXES, "image_path", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
ID_COLUMNS = ("image_id", "sha256", "md5", "url")
FEWEST_TO_JUDGE = 100  # pairs before the share of bad pairs is checked
# Limits of tar files, because a small compressed one may hold a huge file.
MAX_PAIR_BYTES = 1 << 28  # 50 million pixels of 4 bytes have 200 MB
MAX_TEXT_BYTES = 1 << 20  # of a pair's JSON or text, which take more memory when they are parsed
MAX_HEADER_BYTES = 1 << 16  # of a name or of attributes that do not fit into a header of 512 bytes
EXTENSION_TYPES = (b"L", b"K", b"x", b"g", b"X")  # of such headers
MAX_READS_PAST_END = 100  # `tarfile` skips a file, however large its header says it is, in reads of 10 KB
MAX_BLOCK_BYTES = 1 << 30  # of a shuffled block
POSITION = ("pass_number", "seen", "bad", "block_start", "given")  # of a stream, by its attributes


# Shards


@dataclass
class EndingFile:
    """A file that raises a `ReadError` for a reader that goes on past its end."""

    file: Any
    reads_past_end: int = 0

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.reads_past_end += not block
        if self.reads_past_end > MAX_READS_PAST_END:
            raise tarfile.ReadError("it ends before its last file")
        return block


class SmallHeader(tarfile.TarInfo):
    """A member of a tar file with bounded attributes, which `tarfile` reads into memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENSION_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {header.size:,} bytes, more than {MAX_HEADER_BYTES:,}")
        return header


@dataclass(frozen=True)
class TarShard:
    """
    A tar file of WebDataset (https://github.com/webdataset/webdataset). The files of one name are a pair. A file that
    is cut, or that goes on after its end, has a fault. Images are files of the tar file: its JSON names none outside.
    """

    name: str

    def __iter__(self) -> Iterator[dict | Fault]:
        from webdataset.gopen import gopen

        try:
            with gopen(self.name) as file:
                stream: Any = EndingFile(file)
                tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=SmallHeader)
                yield from self._pairs(tar)
                end: Any = tar.fileobj  # after the first of two blocks of zeros, or a broken header
                if end.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its last file is not followed by two blocks of zeros")
                while block := end.read(1 << 20):
                    if block.strip(b"\0"):
                        raise tarfile.ReadError("its end is followed by other data, as in joined files")
        except Exception as error:  # broken files and connections raise any type of error
            yield Fault(self.name, "broken tar file", printable(str(error)))

    def _files(self, tar: Any) -> Iterator[tarfile.TarInfo]:
        for member in tar:
            tar.members.clear()  # which grow with the file
            tar.pax_headers.clear()
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is a sparse file")
            if member.isfile():
                yield member

    def _pairs(self, tar: tarfile.TarFile) -> Iterator[dict | Fault]:
        from webdataset.tariterators import base_plus_ext

        files = ((*base_plus_ext(member.name), member) for member in self._files(tar))
        for key, files_of_pair in groupby(files, key=itemgetter(0)):
            if key is None:  # a file without a suffix
                continue
            source = printable(f"{self.name}/{key}")
            try:
                contents = _contents(tar, files_of_pair)
                yield {**_record_of_pair(contents), "source": source}
            except BadRowError as error:
                yield Fault(source, error.reason, error.detail)


def _contents(tar: tarfile.TarFile, files: Iterable[tuple[str, str, tarfile.TarInfo]]) -> dict[str, bytes]:
    """Return the contents of a pair's files, (name, suffix, member), by suffix. Files of no use are not read."""
    contents = {}
    left = MAX_PAIR_BYTES
    for _, suffix, member in files:
        suffix = suffix.lower()
        if suffix in contents:
            raise BadRowError("a file twice", member.name)
        contents[suffix] = b""
        is_text = suffix in ("json", "txt")
        if not is_text and suffix not in IMAGE_SUFFIXES:
            continue
        limit = min(left, MAX_TEXT_BYTES) if is_text else left
        if member.size > limit:
            raise BadRowError("a file too large", f"{member.name}: {member.size:,} bytes, more than {limit:,}")
        left -= member.size
        file: Any = tar.extractfile(member)
        contents[suffix] = file.read()
    return contents


def _record_of_pair(contents: dict[str, bytes]) -> dict:
    try:
        record = parsed_record(contents["json"].decode("utf-8")) if "json" in contents else {}
        if "txt" in contents:
            record["caption"] = contents["txt"].decode("utf-8")
    except (BadRowError, UnicodeDecodeError) as error:
        raise BadRowError("broken .json or .txt", str(error)) from error
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in contents), None)
    image = None if suffix is None else contents[suffix]
    return {**record, "image": image, "image_root": None}


@dataclass(frozen=True)
class FileShard:
    """A JSON, JSONL, CSV or Parquet file, one pair per row. Paths of images are relative to `image_root`."""

    name: str
    image_root: str

    def __iter__(self) -> Iterator[dict | Fault]:
        try:
            for number, record in read_records(Path(self.name)):
                source = f"{Path(self.name).name} row {number}"
                try:
                    yield {**parsed_record(record), "source": source, "image_root": self.image_root}
                except BadRowError as error:
                    yield Fault(source, error.reason, error.detail)
        except (ValueError, OSError) as error:  # an error of the whole file, as for a broken tar file
            yield Fault(self.name, printable(str(error)))


@dataclass(frozen=True)
class HubShard:
    """A shard of a streamed data set on the Hub."""

    name: str
    dataset: IterableDataset
    index: int

    def __iter__(self) -> Iterator[dict | Fault]:
        rows = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.index)
        for number, record in enumerate(rows, start=1):
            yield {**record, "source": f"{self.name} row {number}"}


Shard = TarShard | FileShard | HubShard


def find_shards(
    patterns: Sequence[str], image_root: str | None = None, option: str = "--train_shards"
) -> list[TarShard | FileShard]:
    """
    Return the shards that match patterns, in order: paths or URLs of tar files (`.tar`, `.tar.gz`), or paths of files
    with rows, with braces as in `cc3m-{000..331}.tar`, or with `*`. The webdataset library opens remote files:
    `https://...`, `s3://...`, or `pipe:command`. Image paths in rows are relative to `image_root`, or else to the
    folder of the file. A `FileNotFoundError` for a path that does not exist names the `option`.
    """
    names: list[str] = []
    for pattern in patterns:
        if "{" in pattern:
            from webdataset.shardlists import expand_urls  # an extra

            names += expand_urls(pattern)
        else:
            names.append(pattern)
    shards: list[TarShard | FileShard] = []
    for name in names:
        is_remote = "://" in name or name.startswith("pipe:")
        found = [name] if is_remote or Path(name).is_file() else sorted(glob.glob(name))
        if not found:
            raise FileNotFoundError(f"The file {name} does not exist. Correct {option}.")
        for path in found:
            if path.endswith((".tar", ".tar.gz", ".tgz")):
                shards.append(TarShard(path))
            else:
                shards.append(FileShard(path, image_root or str(Path(path).parent)))
    return shards


def hub_shards(name: str, config_name: str | None = None, split: str = "train", **load_options) -> list[HubShard]:
    """Return the shards of a streamed data set on the Hub."""
    dataset = without_decoding(load_dataset(name, config_name, split=split, streaming=True, **load_options))
    return [HubShard(f"{name} {split} shard {index}", dataset, index) for index in range(dataset.num_shards)]


# Streams


@dataclass(eq=False)
class PairStream(TorchIterableDataset):
    """
    Endless stream of rows with `image` (an RGB `PIL.Image`), `image_id`, `caption` and `source`.

    Each pass reads the shards in another order, with `datasets`: it gives shards to processes and workers, and saves
    and restores positions, from which torchdata's `StatefulDataLoader` resumes with the next pair. Records are
    shuffled block by block, because `datasets` does not save the contents of its shuffle buffer.

    A record has an image (a path, encoded bytes, or both as in Parquet files of the `datasets` library) and one or
    more captions, of which each pass draws one. The first of `ID_COLUMNS`, or else the path, identifies the image.
    Images without any of these are distinct.

    Args:
        shards (`Sequence[Shard]`): with fewer shards than processes, each process reads all of them and takes its
            share of the records. A process uses at most one worker per shard.
        seed (`int`, *optional*, defaults to 0): seed of the order of shards and records, and of the captions.
        buffer_size (`int`, *optional*, defaults to 1000): number of records in a shuffled block, at least 1. A block
            ends earlier if its records take more than 1 GiB.
        process_index, num_processes (`int`, *optional*): rank and number of training processes.
        image_column, caption_column (`str`, *optional*): by default the first of `IMAGE_COLUMNS` and of
            `CAPTION_COLUMNS` that a record has.
        processor (`TripsProcessor`, *optional*): captions that it makes no tokens or too many of are bad, and so are
            images smaller than its patches.
        max_bad_share (`float`, *optional*, defaults to 0.0): largest share of bad pairs, which are skipped.
        log_folder (`str` or `Path`, *optional*): folder of `bad_pairs-*.jsonl`, the bad pairs of the first pass, one
            file per reader.

    Raises:
        ValueError: Raised by iteration, if there are too many bad pairs or no good pair.
    """

    shards: Sequence[Shard]
    seed: int = 0
    buffer_size: int = 1000
    process_index: int = 0
    num_processes: int = 1
    image_column: str | None = None
    caption_column: str | None = None
    processor: TripsProcessor | None = None
    max_bad_share: float = 0.0
    log_folder: str | Path | None = None

    def __post_init__(self):
        if self.buffer_size < 1:
            raise ValueError(f"`buffer_size` must be at least 1, got {self.buffer_size}.")
        self.log: Path | None = None
        self.pass_number = 0
        self.seen = 0  # records of all passes
        self.bad = 0
        self.last_fault: Fault | None = None
        self.block_start: dict | None = None  # state of `datasets` before the current block, None at a pass's start
        self.given = 0  # records of the current block

    def state_dict(self) -> dict:
        """
        Return the position: the pass, the numbers of records seen and of bad ones, the state of `datasets` before the
        current block, and the number of its records that were given.
        """
        return {name: getattr(self, name) for name in POSITION}

    def load_state_dict(self, state: dict):
        for name in POSITION:
            setattr(self, name, state[name])

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        num_workers = 1 if worker is None else worker.num_workers
        worker_id = 0 if worker is None else worker.id
        if self.log_folder is not None:
            reader = self.process_index * num_workers + worker_id
            self.log = Path(self.log_folder) / f"bad_pairs-{reader:05d}.jsonl"
        while True:
            records = self.records_of_pass()
            if worker_id >= records.num_shards:  # other workers read all shards
                return
            if self.block_start is not None:
                records.load_state_dict(self.block_start)
            for block in blocks(records, self.buffer_size):
                random.Random(f"{self.seed}-{self.pass_number}-{block[0]['place']}").shuffle(block)
                for record in block[self.given :]:
                    row = self._row(record["record"])
                    self.given += 1
                    self.seen += 1
                    if isinstance(row, Fault):
                        self.bad += 1
                        self._note(row)
                    else:
                        yield row
                self.block_start = records.state_dict()
                self.given = 0
                block.clear()  # before the next one is read
            self._judge(fewest=0)
            self.block_start = None
            self.pass_number += 1

    def records_of_pass(self) -> IterableDataset:
        """Return this process's records of a pass."""
        shards = list(self.shards)
        random.Random(f"{self.seed}-{self.pass_number}").shuffle(shards)
        records = IterableDataset.from_generator(read_shards, gen_kwargs={"shards": shards})
        if len(shards) < self.num_processes:
            return split_dataset_by_node(records, self.process_index, self.num_processes)
        return records.shard(self.num_processes, self.process_index)

    def _row(self, record: dict | Fault) -> dict | Fault:
        if isinstance(record, Fault):
            return record
        columns = dict(record)
        source = columns.pop("source")
        patch_size = 1 if self.processor is None else self.processor.patch_size
        try:
            caption = self._caption(columns, seed=f"{self.seed}-{self.pass_number}-{source}")
            encoded = encoded_image(columns, self.image_column)
            image_root = columns.get("image_root") or ""
            place = encoded if isinstance(encoded, bytes) else str(Path(image_root) / encoded)
            image = decode_image(place, patch_size)
            image_id = text_of(columns.get(_first_filled(columns, ID_COLUMNS)), "image_id")
        except BadRowError as error:
            return Fault(source, error.reason, error.detail)
        default_id = source if isinstance(encoded, bytes) else encoded
        return {"image": image, "image_id": image_id or default_id, "caption": caption, "source": source}

    def _caption(self, columns: dict, seed: str) -> str:
        name = self.caption_column or _first_filled(columns, CAPTION_COLUMNS)
        captions = one_or_several({name: columns.get(name)}, one=name, several="captions")
        texts = caption_texts(captions, columns)
        text = random.Random(seed).choice(texts)
        if self.processor is not None:
            tokenizer = self.processor.tokenizer
            cleaned = self.processor.clean_texts([text])
            (tokens,) = tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"]
            check_length(len(tokens), self.processor, "caption", tokenizer.num_special_tokens_to_add())
        return text

    def _note(self, fault: Fault):
        """Log a bad pair, and stop if there are too many."""
        if self.log is not None and self.pass_number == 0:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"source": fault.source, "error": fault.error}, ensure_ascii=False)
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{line}\n")
        self.last_fault = fault
        if self.max_bad_share == 0:
            raise ValueError(f"{fault}. Repair it, or skip such pairs with --skip_bad_rows.")
        self._judge(fewest=FEWEST_TO_JUDGE)

    def _judge(self, fewest: int):
        is_end_of_pass = fewest == 0
        has_no_good_pair = is_end_of_pass and self.bad == self.seen
        has_too_many = self.bad > self.max_bad_share * self.seen
        if self.seen < fewest or not (has_too_many or has_no_good_pair):
            return
        named = "" if self.log is None else f" {self.log} names bad ones."
        raise ValueError(
            f"{self.bad} of the first {self.seen} pairs are bad: more than --max_bad_share allows, or all.{named} "
            f"The last bad one: {self.last_fault}."
        )


def read_shards(shards: list[Shard]) -> Iterator[dict]:
    for shard in shards:
        for number, record in enumerate(shard):
            yield {"place": f"{shard.name} {number}", "record": record}


def blocks(records: Iterable[dict], length: int) -> Iterator[list[dict]]:
    """Yield blocks of so many records, or fewer if they take more than `MAX_BLOCK_BYTES`."""
    block = []
    taken = 0
    for record in records:
        block.append(record)
        taken += num_bytes(record)
        if len(block) == length or taken > MAX_BLOCK_BYTES:
            yield block
            block = []
            taken = 0
    if block:
        yield block


def num_bytes(record: dict) -> int:
    """Return the memory that a record takes, with all that it holds."""
    total = 0
    waiting: list[Any] = [record]
    while waiting:
        value = waiting.pop()
        total += sys.getsizeof(value)
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return total


def _first_filled(columns: dict, names: Iterable[str]) -> str | None:
    return next((name for name in names if not is_missing(columns.get(name))), None)


def encoded_image(columns: dict, column: str | None = None) -> str | bytes:
    """
    Return the path or the encoded bytes of a record's image, which may be a dictionary with either. The default column
    is the first of `IMAGE_COLUMNS` that is filled. Records of tar files hold their images: a path there is refused.
    """
    name = column or _first_filled(columns, IMAGE_COLUMNS)
    image = path_or_bytes(columns.get(name))
    if isinstance(image, bytes):
        return image
    path = filled_text({**columns, "image": image}, "image")
    if columns.get("image_root", "") is None:
        raise BadRowError("no image in the tar file", f"{name} names another file, {path}")
    return path
