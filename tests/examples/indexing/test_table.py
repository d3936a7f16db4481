"""The table: fingerprints, atomic commits, a single writer, and the index."""

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_collection import save_model

from trips_examples.indexing.sources import id_of
from trips_examples.indexing.table import (
    Fingerprint,
    add_rows,
    build_index,
    fingerprint_of,
    load_model,
    open_table,
    table_schema,
)
from trips_examples.training.files import only_writer


DIM = 32
OWN = Fingerprint("a/model", "5:image:0.7", "0" * 32)


def make_rows(numbers: range, broken: int | None = None) -> pa.Table:
    vectors = np.random.default_rng(numbers.start).standard_normal((len(numbers), DIM), dtype=np.float32)
    rows = [
        {"id": id_of(str(number)), "source": str(number), "vector": None if number == broken else vector}
        | {"error": "broken" if number == broken else None, "image": {"bytes": b"x", "path": None}}
        for number, vector in zip(numbers, vectors)
    ]
    return pa.Table.from_pylist(rows, schema=table_schema(DIM))


def add(table: lance.LanceDataset, numbers: range, **options) -> lance.LanceDataset:
    return add_rows(table, make_rows(numbers, **options))


@pytest.fixture
def table(tmp_path) -> lance.LanceDataset:
    return open_table(str(tmp_path / "t.lance"), OWN, DIM)


def test_a_fingerprint_is_of_weights_schedule_and_pixels(checkpoint, tmp_path):
    def fingerprint(path=checkpoint, schedule=None, **pixels) -> Fingerprint:
        model, processor = load_model(path, schedule)
        for name, value in pixels.items():
            setattr(processor.image_processor, name, value)
        return fingerprint_of(model, processor)

    own = fingerprint()
    assert own == fingerprint()
    assert own.model == checkpoint
    assert own.schedule == "2:text:0.5,3:text:0.5"
    copy = save_model(tmp_path / "copy")
    assert fingerprint(copy).digest == own.digest  # under any name
    model, processor = load_model(copy)
    with torch.no_grad():
        model.vision_proj.bias[3] += 1e-3
    assert fingerprint_of(model, processor).digest != own.digest
    assert fingerprint(schedule="2:image:0.5").digest != own.digest
    assert fingerprint(image_mean=[0.1, 0.2, 0.3]).digest != own.digest


def test_a_table_of_another_fingerprint_is_refused(table):
    add(table, range(3))
    assert open_table(table.uri, OWN, DIM).count_rows() == 3
    with pytest.raises(ValueError, match="a/model .*unpruned"):
        open_table(table.uri, Fingerprint("b/model", "unpruned", "1" * 32), DIM)


def indexed(table: lance.LanceDataset) -> int:
    return sum(index.num_rows_indexed for index in table.describe_indices())


def test_the_index_has_all_rows_and_is_made_anew_when_rows_come(table):
    table = add(add(table, range(300)), range(300, 600), broken=400)
    build_index(table, fewest=300)
    table = open_table(table.uri, OWN)
    assert indexed(table) == 600
    assert table.stats.dataset_stats()["num_fragments"] == 1
    version = table.latest_version
    build_index(table, fewest=300)
    assert open_table(table.uri, OWN).version == version
    table = add(table, range(600, 650))
    assert indexed(table) == 600
    build_index(table, fewest=300)
    table = open_table(table.uri, OWN)
    assert indexed(table) == table.count_rows() == 650


@pytest.mark.parametrize("name", ["alias.lance", "folder/t.lance", "file://{}/t.lance", "t.lance/"])
def test_a_table_has_one_lock_under_all_of_its_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alias.lance").symlink_to("t.lance")
    (tmp_path / "folder").symlink_to(tmp_path)
    name = name.format(tmp_path)
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "t.lance"))
    assert lance.dataset(name).count_rows() == 1
    with only_writer(str(tmp_path / "t.lance")), pytest.raises(BlockingIOError), only_writer(name):
        pass
    with only_writer(name), pytest.raises(BlockingIOError, match="t.lance"), only_writer("t.lance"):
        pass
