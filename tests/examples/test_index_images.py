"""`index_images.py` and `search.py`, also in two processes and after they are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import lance
import numpy as np
import PIL.Image
import psutil
import pytest
from places import EXAMPLES
from tiny_collection import TEXTS, save_model, write_images, write_parquet, write_tar

from trips_examples.data.images import decode_image
from trips_examples.indexing.finding import Finder
from trips_examples.indexing.sources import find_images, rows_of


NUM_IMAGES = 600
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection")
    save_model(folder / "model")
    write_images(folder / "images", range(NUM_IMAGES))
    (folder / "images/0.png").write_bytes(b"no image")
    return folder


def command(script: str, folder, *options: str, launcher: tuple = ()) -> list[str]:
    return [sys.executable, *launcher, str(EXAMPLES / script), "--model", str(folder / "model"), *map(str, options)]


def finished_run(script: str, folder, *options, code: int = 0) -> str:
    result = subprocess.run(command(script, folder, *options), env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == code, result.stderr[-4000:]
    return result.stdout + result.stderr if script == "index_images.py" else result.stdout


def rows_in(table) -> int:
    try:
        return lance.dataset(str(table)).count_rows()
    except ValueError:
        return 0


def wait_for_rows(process: subprocess.Popen, table, more_than: int) -> int:
    until = time.monotonic() + 300
    while (rows := rows_in(table)) <= more_than:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0][-4000:]
        time.sleep(0.02)
    assert rows < NUM_IMAGES, "it was done before it could be killed"
    return rows


def check_rows(folder, table):
    """Check that each image has one row with the model's vector, and the broken image has its error."""
    finder = Finder(str(table), str(folder / "model"))
    rows = finder.table.to_table().to_pylist()
    by_source = {row["source"]: row for row in rows}
    sources = set()
    for shard in find_images([str(folder / "images")]):
        sources |= {row["source"] for row in rows_of(shard)}
    assert len(rows) == NUM_IMAGES and by_source.keys() == sources
    broken = [row["source"] for row in rows if row["error"]]
    assert broken == [f"{folder}/images/0.png"]
    paths = [f"{folder}/images/{number}.png" for number in range(1, NUM_IMAGES)]
    vectors = [by_source[path]["vector"] for path in paths]
    expected = finder.evaluator.index_images([decode_image(path) for path in paths])
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_loses_and_doubles_nothing(folder):
    table = folder / "killed.lance"
    words = ["--images", folder / "images", "--table", table, "--rows_per_commit", "8", "--batch_size", "8"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

    def start() -> subprocess.Popen:
        line = command("index_images.py", folder, *words, launcher=launcher)
        return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start()
    rows = wait_for_rows(process, table, 40)
    family = psutil.Process(process.pid).children(recursive=True)
    for member in (process, *family):
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=60)
    assert rows <= rows_in(table) < NUM_IMAGES
    printed, _ = (process := start()).communicate(timeout=600)
    assert process.returncode == 0 and "599 images, 1 that cannot be used" in printed, printed[-4000:]
    # 600 files are 3 shards.
    assert "Process 1 of 2: 2 of 3 shards" in printed and "Process 2 of 2: 1 of 3 shards" in printed
    check_rows(folder, table)


@pytest.mark.slow
def test_accelerate_without_gpus_says_what_to_type(folder):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2")
    words = ["--images", folder / "images", "--table", folder / "none.lance"]
    line = command("index_images.py", folder, *words, launcher=launcher)
    result = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode != 0 and "torchrun --nproc_per_node" in result.stderr
    assert not (folder / "none.lance").exists()


@pytest.mark.slow
def test_every_form_of_a_collection_comes_in_and_is_found(folder, tmp_path):
    data = {
        "parquet": write_parquet(tmp_path / "rows.parquet", range(0, 300)),
        "tar": write_tar(
            tmp_path / "shard.tar", {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
        ),
    }
    table = tmp_path / "t.lance"
    words = ["--table", table, "--index_from", "256"]
    printed = finished_run("index_images.py", folder, "--images", *data.values(), *words)
    assert "899 images, 1 that cannot be used (unreadable image: 1); an index of 899 vectors" in printed
    assert f"{tmp_path}/shard.tar/0: unreadable image" in printed
    write_parquet(tmp_path / "hub/train.parquet", range(1000, 1030))
    printed = finished_run("index_images.py", folder, "--dataset_name", tmp_path / "hub", *words, "--retry_broken")
    assert "929 images, 0 that cannot be used" in printed and "an index" in printed
    assert len(set(lance.dataset(str(table)).to_table()["id"].to_pylist())) == 929

    words = ["--k", "4", "--picture", tmp_path / "found.png", "--output_json", tmp_path / "found.json"]
    found = finished_run("search.py", folder, "--table", table, "--text", *TEXTS, *words)
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [(row["query"], row["rank"]) for row in rows] == [(text, rank) for text in TEXTS for rank in (1, 2, 3, 4)]
    assert all(row["source"] in found for row in rows)
    assert PIL.Image.open(tmp_path / "found.png").width > 900
    found = finished_run("search.py", folder, "--table", table, "--image", folder / "images/7.png", "--k", "2")
    assert "   1  similarity 1.000" in found
    assert all(0 <= row["match"] <= 1 for row in rows)
