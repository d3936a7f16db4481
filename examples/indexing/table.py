"""
The table: a Lance dataset with a row per image, made by one model with one schedule, which its metadata name.

A commit adds rows or does not: what is killed before it leaves files that no version of the table knows. An image that
cannot be used has its row, too, with an `error` and no vector.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import lance
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout

from modeling_trips import SelectionSchedule, TripsForPreTraining, TripsForRetrieval, TripsProcessor
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint
from trips_examples.indexing.sources import ROW_SCHEMA


METADATA = "trips"
GRAPH_SUFFIXES = (".onnx", ".data", ".xml", ".bin")
HEADS = (TripsForRetrieval, TripsForPreTraining)  # models with image features that match pairs
Retriever = TripsForRetrieval | TripsForPreTraining


@dataclass(frozen=True)
class Fingerprint:
    """
    What vectors depend on: they can be compared with others of the same `digest`.

    Args:
        model (`str`): as it was named.
        schedule (`str`): how it selects, in words.
        digest (`str`): of its weights as they are stored (of an exported model, its files), the fields of its vision
            tower, and how pixels are made.
    """

    model: str
    schedule: str
    digest: str


def load_model(
    checkpoint: str, schedule: str | None = None, dtype: str = "auto", device: str = "cpu"
) -> tuple[Retriever, TripsProcessor]:
    """
    Load a checkpoint with a head for retrieval, or an exported one, in evaluation mode.

    Args:
        checkpoint (`str`): Folder of a checkpoint or of an exported model, or repository on the Hub.
        schedule (`str`, *optional*): Replaces the checkpoint's schedule, as in `5:image:0.7,12:text:0.3`.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` is the dtype of the stored weights.
        device (`str`, *optional*, defaults to `"cpu"`)

    Raises:
        ValueError: The checkpoint has another head, or its weights are incomplete; or a schedule, dtype or device is
            given for an exported model.
        OSError: There is no such checkpoint.
    """
    options = SelectionSchedule.parse(schedule).config_fields if schedule else {}
    if dtype != "auto":
        options["dtype"] = dtype
    if device != "cpu" and is_exported(checkpoint):
        raise ValueError(f"{checkpoint} is an exported model, which runs on CPUs alone, got the device {device}.")
    model = load_checkpoint(checkpoint, HEADS, **options)
    return model.to(device), TripsProcessor.from_pretrained(checkpoint)


def fingerprint_of(model: Retriever, processor: TripsProcessor) -> Fingerprint:
    """Return the fingerprint of a model in the precision in which its weights are stored."""
    checkpoint = model.config.name_or_path
    vision = model.config.vision_config
    parts = [vision.to_dict(), processor.image_processor.to_dict()]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    if is_exported(checkpoint):
        for path in sorted(Path(checkpoint).iterdir()):
            if path.suffix in GRAPH_SUFFIXES:
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return Fingerprint(checkpoint, str(vision.schedule), digest.hexdigest()[:32])


def open_table(uri: str, fingerprint: Fingerprint) -> lance.LanceDataset:
    """
    The table at a place.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was made by another model or schedule.
    """
    try:
        table = lance.dataset(uri)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        raise FileNotFoundError(f"There is no table {uri}: make it with index_images.py.") from error
    stored = (table.schema.metadata or {}).get(METADATA.encode())
    if stored is None:
        raise ValueError(f"{uri} is a Lance table, but none of images that index_images.py made: name another.")
    made_by = Fingerprint(**json.loads(stored))
    if made_by.digest != fingerprint.digest:
        raise ValueError(
            f"The vectors of {uri} are of {made_by.model} ({made_by.schedule}; {made_by.digest}), and cannot be "
            f"compared with those of {fingerprint.model} ({fingerprint.schedule}; {fingerprint.digest}). Give the "
            "model and the --schedule that it was made with, or make another table."
        )
    return table


def open_or_create_table(uri: str, fingerprint: Fingerprint, dim: int) -> lance.LanceDataset:
    """The table at a place, which is made if there is none; vectors have `dim` numbers. Raises as `open_table`."""
    with contextlib.suppress(FileNotFoundError):
        return open_table(uri, fingerprint)
    schema = table_schema(dim).with_metadata({METADATA: json.dumps(asdict(fingerprint))})
    return lance.write_dataset(schema.empty_table(), uri)


def table_schema(dim: int) -> pa.Schema:
    return ROW_SCHEMA.append(pa.field("vector", pa.list_(pa.float32(), dim)))


@contextlib.contextmanager
def only_writer(uri: str) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends. A table on an object store has none."""
    path = local_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(f"Another process is writing {uri}: let it end, or stop it.") from error


def local_path(uri: str) -> Path | None:
    """Return the path of a table on this machine's file systems, without symbolic links; None for other places."""
    parts = urlsplit(uri)
    if parts.scheme in ("file", "file-object-store"):
        return Path(unquote(parts.path)).resolve()
    return None if "://" in uri else Path(uri).expanduser().resolve()


def forget_missing_images(table: lance.LanceDataset):
    """Delete the rows of images that were missing: they may be there now."""
    missing = "error LIKE 'missing image%'"
    if table.count_rows(missing):
        table.delete(missing)


def count_faults(table: lance.LanceDataset) -> Counter[str]:
    """Count the images that cannot be used by reason."""
    errors = table.to_table(columns=["error"], filter="error IS NOT NULL")["error"].to_pylist()
    return Counter(error.partition(" (")[0] for error in errors)


def write_rows(uri: str, rows: pa.Table) -> list[str]:
    """Writes the data of rows beside the table, as fragments that only `commit` makes a part of it."""
    fragments = lance.fragment.write_fragments(rows, uri, schema=rows.schema, mode="append")
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def commit(table: lance.LanceDataset, fragments: Sequence[str]) -> lance.LanceDataset:
    """The table with these fragments."""
    append = lance.LanceOperation.Append([lance.FragmentMetadata.from_json(fragment) for fragment in fragments])
    return lance.LanceDataset.commit(table.uri, append, read_version=table.version)


def ids_of(table: lance.LanceDataset) -> np.ndarray:
    """Sorted, `(num_rows,)`, of type `S32`."""
    return np.sort(table.to_table(columns=["id"])["id"].to_numpy().astype("S32"))


def build_index(table: lance.LanceDataset, index_type: str, fewest: int) -> str:
    """
    Puts small fragments together and indexes the vectors, unless that is done.

    Args:
        table (`lance.LanceDataset`)
        index_type (`str`): one of Lance's, such as `"IVF_PQ"`; `"none"` for none.
        fewest (`int`): rows from which there is an index. Below it search is exact.

    Returns:
        `str`: what it did, in words.
    """
    table.optimize.compact_files()
    table.cleanup_old_versions(older_than=timedelta(0))
    num_vectors = table.count_rows("error IS NULL")
    if index_type == "none" or num_vectors < fewest:
        return f"no index: search is exact ({num_vectors} vectors)"
    if not rows_without_index(table):
        return "the index is complete"
    dim = table.schema.field("vector").type.list_size
    options = {"num_sub_vectors": max(1, dim // 8)} if "PQ" in index_type else {}
    table.create_index("vector", index_type, metric="cosine", replace=True, **options)
    return f"an index {index_type} of {num_vectors} vectors"


def rows_without_index(table: lance.LanceDataset) -> int:
    """Those that a search would have to compare one by one."""
    indexed = sum(index.num_rows_indexed for index in table.describe_indices())
    return table.count_rows() - indexed
