"""Shards of image-text pairs. A shard yields records, or faults in their place, in a fixed order."""

import glob
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from trips_examples.data.annotations import IMAGE_SUFFIXES, parsed_record, read_records
from trips_examples.data.images import without_decoding
from trips_examples.data.tasks import BadRowError, Fault, printable


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class StrictHeader(tarfile.TarInfo):
    """Header of a member of a tar file. A broken one is an error; `tarfile` would take it for the end of the file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "StrictHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} after the files before it") from error


@dataclass(frozen=True)
class TarShard:
    """
    A tar file of WebDataset (https://github.com/webdataset/webdataset). The files of one name are a pair. A file that
    is cut, or that goes on after its end, has a fault.
    """

    name: str

    def __iter__(self) -> Iterator[dict | Fault]:
        from webdataset.gopen import gopen

        try:
            with gopen(self.name) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictHeader) as tar:
                yield from self._pairs(tar)
                end: Any = tar.fileobj  # after the first of two blocks of zeros
                if end.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it does not end with two blocks of zeros")
                if any(block.strip(b"\0") for block in iter(partial(end.read, 1 << 20), b"")):
                    raise tarfile.ReadError("its end is followed by other data, as in joined files")
        except Exception as error:  # broken files and connections raise any type of error
            yield Fault(self.name, "broken tar file", printable(str(error)))

    def _pairs(self, tar: tarfile.TarFile) -> Iterator[dict | Fault]:
        from webdataset.tariterators import base_plus_ext

        named = ((*base_plus_ext(member.name), member) for member in tar if member.isfile())
        for key, members in groupby(named, key=itemgetter(0)):
            contents = [(suffix.lower(), tar.extractfile(member).read()) for _, suffix, member in members if suffix]
            if key is not None:
                yield _record_of_tar(printable(f"{self.name}/{key}"), contents)


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


def _record_of_tar(source: str, contents: list[tuple[str, bytes]]) -> dict | Fault:
    """Return the image, `.txt` and `.json` files of one name as a record."""
    sample = dict(contents)
    if len(sample) < len(contents):
        return Fault(source, "a file twice", ", ".join(suffix for suffix, _ in contents))
    try:
        record = parsed_record(sample["json"].decode("utf-8")) if "json" in sample else {}
        if "txt" in sample:
            record["caption"] = sample["txt"].decode("utf-8")
    except (BadRowError, UnicodeDecodeError) as error:
        return Fault(source, "broken .json or .txt", str(error))
    image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    return {**record, "source": source, "image": image}


def find_shards(
    patterns: Sequence[str], image_root: str | None = None, option: str = "--train_shards"
) -> list[TarShard | FileShard]:
    """
    Return the shards that match patterns, in order.

    Args:
        patterns (`Sequence[str]`): paths or URLs of tar files (`.tar`, `.tar.gz`), or paths of files with rows
            (`.jsonl`, `.json`, `.csv`, `.parquet`), with braces as in `cc3m-{000..331}.tar`, or with `*`. The
            webdataset library opens remote files: `https://...`, `s3://...`, or `pipe:command`.
        image_root (`str`, *optional*): folder that image paths in rows are relative to. Default: the folder of the
            file.
        option (`str`, *optional*, defaults to `"--train_shards"`): name of the option in error messages.

    Raises:
        FileNotFoundError: A path does not exist.
    """
    from webdataset.shardlists import expand_urls

    shards: list[TarShard | FileShard] = []
    for name in (name for pattern in patterns for name in (expand_urls(pattern) if "{" in pattern else [pattern])):
        is_remote = "://" in name or name.startswith("pipe:")
        found = [name] if is_remote or Path(name).is_file() else sorted(glob.glob(name))
        if not found:
            raise FileNotFoundError(f"The file {name} does not exist. Correct {option}.")
        for path in found:
            is_tar = path.endswith(TAR_SUFFIXES)
            shards.append(TarShard(path) if is_tar else FileShard(path, image_root or str(Path(path).parent)))
    return shards


def hub_shards(name: str, config_name: str | None = None, split: str = "train", **load_options) -> list[HubShard]:
    """Return the shards of a streamed data set on the Hub."""
    dataset = without_decoding(load_dataset(name, config_name, split=split, streaming=True, **load_options))
    return [HubShard(f"{name} {split} shard {index}", dataset, index) for index in range(dataset.num_shards)]
