"""
The table: a Lance dataset with a row per image. Its metadata name the model and the schedule that made it.

Commits are atomic. A process that is killed before its commit leaves files that no version of the table refers to. An
image that cannot be used also has a row, with an `error` and no vector.
"""

import hashlib
import json
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import lance
import pyarrow as pa
import torch

from modeling_trips import TripsForPreTraining, TripsForRetrieval, TripsProcessor
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint, load_processor
from trips_examples.indexing.sources import ROW_SCHEMA


METADATA = b"trips"
HEADS = (TripsForRetrieval, TripsForPreTraining)  # models with image features that match pairs
Retriever = TripsForRetrieval | TripsForPreTraining


class Fingerprint(NamedTuple):
    """
    Model and schedule that made vectors, and the hash of stored weights (or of an exported model's files), vision
    configuration and image preprocessing. Vectors of the same `digest` are comparable.
    """

    model: str
    schedule: str
    digest: str


def load_model(
    checkpoint: str, schedule: str | None = None, dtype: str = "auto", device: str = "cpu"
) -> tuple[Retriever, TripsProcessor]:
    """
    Load a checkpoint with a head for retrieval, or an exported one, in evaluation mode. `schedule` replaces that of
    the checkpoint (`5:image:0.7,12:text:0.3`), and `dtype` that of the stored weights; an exported model has neither.
    """
    options = {"schedule": schedule} if schedule else {}
    if dtype != "auto":
        options["dtype"] = dtype
    if not is_exported(checkpoint):
        model = load_checkpoint(checkpoint, HEADS, **options).to(device)
    elif options or device != "cpu":
        raise ValueError(
            f"{checkpoint} is an exported model for CPUs, with a fixed schedule and dtype. Leave these options out."
        )
    else:
        from modeling_trips.export import load_exported  # an extra

        model = load_exported(checkpoint, HEADS)
    return model, load_processor(checkpoint, model.config)


def fingerprint_of(model: Retriever, processor: TripsProcessor) -> Fingerprint:
    """Return the fingerprint of a model, with weights in their stored precision."""
    checkpoint = model.config.name_or_path
    vision_config = model.config.vision_config
    preprocessing = [vision_config.to_dict(), processor.image_processor.to_dict()]
    digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        stored = weight.cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode())
        digest.update(stored.numpy())
    if is_exported(checkpoint):
        for path in sorted(Path(checkpoint).iterdir()):
            if path.suffix in (".onnx", ".data", ".xml", ".bin"):
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return Fingerprint(
        model=checkpoint,
        schedule=str(vision_config.schedule),
        digest=digest.hexdigest()[:32],
    )


def open_table(uri: str, fingerprint: Fingerprint, dim: int | None = None) -> lance.LanceDataset:
    """
    Open a table, or create it if `dim`, the size of its vectors, is given. Otherwise a `FileNotFoundError` is raised,
    and a `ValueError` for a table of another model or schedule.
    """
    try:
        table = lance.dataset(uri)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        if dim is not None:
            schema = table_schema(dim).with_metadata({METADATA: json.dumps(fingerprint)})
            return lance.write_dataset(schema.empty_table(), uri)
        raise FileNotFoundError(f"The table {uri} does not exist. Make it with index_images.py.") from error
    if METADATA not in (table.schema.metadata or {}):
        raise ValueError(f"{uri} is a Lance table that index_images.py did not make. Give another.")
    made_by = Fingerprint(*json.loads(table.schema.metadata[METADATA]))
    if made_by.digest != fingerprint.digest:
        raise ValueError(
            f"The vectors of {uri} come from {made_by.model} ({made_by.schedule}; {made_by.digest}), got "
            f"{fingerprint.model} ({fingerprint.schedule}; {fingerprint.digest}). Give the --model and --schedule of "
            "the table, or make another table."
        )
    return table


def table_schema(dim: int) -> pa.Schema:
    return ROW_SCHEMA.append(pa.field("vector", pa.list_(pa.float32(), dim)))


def add_rows(table: lance.LanceDataset, rows: pa.Table) -> lance.LanceDataset:
    """Add rows to the table, also while other processes do, and return its new version."""
    fragments = lance.fragment.write_fragments(rows, table.uri, schema=rows.schema, mode="append")
    return lance.LanceDataset.commit(table.uri, lance.LanceOperation.Append(fragments), read_version=table.version)


def build_index(table: lance.LanceDataset, fewest: int) -> str:
    """
    Merge small fragments, index the vectors unless there are fewer than `fewest` or the index is complete, and return
    the outcome in words. Without an index, search is exact.
    """
    table.optimize.compact_files()
    table.cleanup_old_versions(older_than=timedelta(0))
    num_vectors = table.count_rows("error IS NULL")
    if num_vectors < fewest:
        return f"no index: search is exact ({num_vectors} vectors)"
    if table.count_rows() == sum(index.num_rows_indexed for index in table.describe_indices()):
        return "the index is complete"
    num_sub_vectors = max(1, table.schema.field("vector").type.list_size // 8)
    table.create_index("vector", "IVF_PQ", metric="cosine", replace=True, num_sub_vectors=num_sub_vectors)
    return f"an index of {num_vectors} vectors"
