"""Streams of pairs: each pair once per pass, exact resuming, sharing among readers, and bad pairs."""

import gzip
import json
import tarfile
import tracemalloc
from itertools import islice
from pathlib import Path

import archives
import PIL.Image
import pytest
import strange_pictures
from datasets import Dataset, Features, Image, Value
from torchdata.stateful_dataloader import StatefulDataLoader

from trips_examples.data import streams
from trips_examples.data.collection import rows_of
from trips_examples.data.streams import FileShard, PairStream, TarShard, find_shards, hub_shards


pytest.importorskip("webdataset")


def encoded(color="red", kind="PNG"):
    return strange_pictures.encoded(PIL.Image.new("RGB", (8, 8), color), kind)


def write_tar(path, samples):
    """Write samples with a file per suffix; `key` is their name."""
    files = {}
    for number, sample in enumerate(samples):
        key = sample.pop("key", f"{path.stem}-{number:04d}")
        for suffix, content in sample.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            files[f"{key}.{suffix}"] = content.encode() if isinstance(content, str) else content
    return archives.write_tar(path, files)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Return a pattern of four shards with 5, 6, 7 and 8 pairs and captions "shard-number"."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(4):
        samples = [{"png": encoded(), "txt": f"{shard}-{number}"} for number in range(5 + shard)]
        write_tar(folder / f"pairs-{shard:03d}.tar", samples)
    return f"{folder}/pairs-{{000..003}}.tar"


ALL = {f"{shard}-{number}" for shard in range(4) for number in range(5 + shard)}


def captions(rows):
    return [row["caption"] for row in rows]


def stream_of(place, **options):
    return PairStream(find_shards([str(place)]), **options)


def take(stream, count):
    return list(islice(iter(stream), count))


# Order


def test_a_pass_has_every_pair_once_and_the_next_pass_another_order(tars):
    rows = take(stream_of(tars, buffer_size=10), 52)
    first = captions(rows[:26])
    second = captions(rows[26:])
    assert set(first) == set(second) == ALL
    assert first != second
    assert first != sorted(first)
    again = take(stream_of(tars, seed=0, buffer_size=10), 26)
    assert captions(again) == first
    seeded = take(stream_of(tars, seed=1, buffer_size=10), 26)
    assert captions(seeded) != first
    for row in rows:
        assert row["image"].mode == "RGB"
        assert row["image"].getpixel((0, 0)) == (255, 0, 0)
    # Blocks of ten mix pairs of several shards.
    assert len({caption[0] for caption in first[:10]}) > 1


@pytest.mark.parametrize("num_processes", [3, 7])
def test_processes_share_the_pairs(tars, num_processes):
    """Processes share shards, or with more processes than shards, records."""
    passes = []
    for index in range(num_processes):
        stream = stream_of(tars, buffer_size=4, process_index=index, num_processes=num_processes)
        rows = iter(stream)
        passes.append([])
        while (row := next(rows)) and stream.pass_number == 0:
            passes[-1].append(row["caption"])
    assert all(passes)
    assert sorted(sum(passes, [])) == sorted(ALL)


# Resuming


@pytest.mark.parametrize(
    "index, num_processes, block_bytes", [(0, 1, 10**9), (1, 2, 10**9), (4, 6, 10**9), (0, 1, 2000)]
)
def test_a_stream_continues_after_any_pair(tars, index, num_processes, block_bytes, monkeypatch):
    """Also where blocks end early."""
    monkeypatch.setattr(streams, "MAX_BLOCK_BYTES", block_bytes)

    def make_stream():
        return stream_of(tars, seed=3, buffer_size=4, process_index=index, num_processes=num_processes)

    stream = make_stream()
    rows = []
    states = []
    for row in islice(stream, 40):
        rows.append(row)
        states.append(json.dumps(stream.state_dict()))
    assert num_processes > 1 or set(captions(rows[:26])) == ALL
    for done in range(1, 30):
        stream = make_stream()
        stream.load_state_dict(json.loads(states[done - 1]))
        assert captions(take(stream, 10)) == captions(rows[done : done + 10])


@pytest.mark.parametrize("num_workers", [0, 5])
def test_a_loader_resumes_and_workers_may_outnumber_shards(tars, num_workers):
    def loader():
        stream = stream_of(tars, buffer_size=4)
        return StatefulDataLoader(stream, batch_size=3, num_workers=num_workers, collate_fn=captions)

    whole = loader()
    batches = iter(whole)
    first = list(islice(batches, 5))
    state = json.loads(json.dumps(whole.state_dict()))
    rest = list(islice(batches, 6))
    assert all(len(batch) == 3 for batch in first + rest)
    assert set(sum(first, [])) <= ALL
    resumed = loader()
    resumed.load_state_dict(state)
    assert list(islice(resumed, 6)) == rest


# What a pair is


def test_images_of_any_kind_and_captions_in_text_or_json(tmp_path):
    samples = [
        {"jpg": encoded("blue", "JPEG"), "txt": " a blue square \n", "json": {"caption": "not this one"}},
        {"webp": encoded("blue", "WEBP"), "json": {"caption": "from json", "url": "http://a/1.webp"}},
        {"png": encoded("blue"), "json": {"text": "the same image", "url": "http://a/1.webp", "width": None}},
        {"JPEG": encoded("blue", "JPEG"), "txt": "upper case", "cls": "7"},
    ]
    path = write_tar(tmp_path / "mixed.tar", samples)
    rows = {row["caption"]: row for row in take(stream_of(path), 4)}
    assert rows.keys() == {"a blue square", "from json", "the same image", "upper case"}
    assert all(row["image"].getpixel((4, 4))[2] > 200 for row in rows.values())
    assert rows["from json"]["image_id"] == rows["the same image"]["image_id"] == "http://a/1.webp"
    assert len({row["image_id"] for row in rows.values()}) == 3
    assert rows["a blue square"]["source"] == f"{path}/mixed-0000"


def test_each_pass_takes_one_of_several_captions(tmp_path):
    (tmp_path / "red.png").write_bytes(encoded())
    (tmp_path / "pairs.json").write_text('[{"image": "red.png", "caption": ["one", "two", "three"]}]')
    drawn = captions(take(stream_of(tmp_path / "*.json"), 20))
    assert set(drawn) == {"one", "two", "three"}
    assert captions(take(stream_of(tmp_path / "*.json"), 20)) == drawn


@pytest.mark.parametrize("name", ["caption", "alt"])
def test_a_streamed_data_set(tmp_path, name):
    """The `datasets` library streams Parquet files like a data set on the Hub."""
    features = Features({"image": Image(), name: Value("string"), "image_id": Value("int64")})
    image = {"bytes": encoded(), "path": None}
    for shard in ("first", "second"):
        columns = {"image": [image] * 3, name: [f"{shard} a", f"{shard} b", f"{shard} c"], "image_id": [5, 5, 6]}
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{shard}.parquet")
    data_files = {"train": str(tmp_path / "*.parquet")}
    shards = hub_shards("parquet", data_files=data_files, cache_dir=str(tmp_path / "cache"))
    assert len(shards) == 2
    rows = take(PairStream(shards, caption_column=None if name == "caption" else "alt"), 6)
    assert sorted(captions(rows)) == ["first a", "first b", "first c", "second a", "second b", "second c"]
    assert {row["image_id"] for row in rows} == {"5", "6"}


def test_patterns_name_shards_and_missing_ones_are_named(tars, tmp_path):
    folder = Path(tars).parent
    shards = find_shards([tars])
    assert [shard.name for shard in shards] == [f"{folder}/pairs-00{number}.tar" for number in range(4)]
    assert find_shards([f"{folder}/*.tar"]) == shards
    assert find_shards(["https://host/{0..1}.tar"])[1].name == "https://host/1.tar"
    with pytest.raises(FileNotFoundError, match="pairs-004.tar .*--train_shards"):
        find_shards([str(folder / "pairs-{000..005}.tar")])
    (tmp_path / "rows.csv").write_text("image,caption\n")
    assert find_shards([str(tmp_path / "*.csv")]) == [FileShard(str(tmp_path / "rows.csv"), str(tmp_path))]


# Bad pairs


def bad_tar(folder, num_good):
    samples = [{"png": encoded(), "txt": f"good {number}"} for number in range(num_good)]
    samples[2:2] = [
        {"key": "torn", "png": encoded()[:50], "txt": "a torn image"},
        {"key": "blank", "png": encoded(), "txt": "  "},
        {"key": "alone", "png": encoded()},
        {"key": "imageless", "txt": "no image"},
        {"key": "broken", "png": encoded(), "json": "{"},
        {"key": "latin", "png": encoded(), "txt": "caf\xe9".encode("latin-1")},
        {"key": "listed", "png": encoded(), "json": "[]"},
        {"key": "double", "png": encoded(), "txt": "a", "TXT": "b"},
        {"key": "number", "png": encoded(), "json": {"caption": {"en": "a"}}},
    ]
    return write_tar(folder / "bad.tar", samples)


def test_bad_pairs_are_skipped_counted_and_named(tmp_path):
    path = bad_tar(tmp_path, num_good=30)
    stream = stream_of(path, max_bad_share=0.3, log_folder=tmp_path / "logs")
    rows = take(stream, 31)
    assert set(captions(rows)) == {f"good {number}" for number in range(30)}
    assert stream.pass_number == 1
    assert stream.bad >= 9
    assert stream.seen - stream.bad == 31
    errors = logged_errors(tmp_path / "logs")
    assert errors.keys() == {"torn", "blank", "alone", "imageless", "broken", "latin", "listed", "number", "double"}
    assert "unreadable image" in errors["torn"]
    assert errors["blank"].startswith("no caption")
    assert errors["imageless"].startswith("no image")
    assert "utf-8" in errors["latin"]


def logged_errors(folder):
    """Return the errors of bad pairs, by the last part of their source."""
    errors = {}
    for line in (folder / "bad_pairs-00000.jsonl").read_text().splitlines():
        pair = json.loads(line)
        errors[Path(pair["source"]).name] = pair["error"]
    return errors


def test_the_first_bad_pair_stops_a_stream_that_was_not_asked_to_skip(tmp_path):
    (tmp_path / "red.png").write_bytes(encoded())
    lines = ['{"image": "red.png", "caption": "a"}', '{"image": "red.png", "caption": ""}'] * 3
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"pairs.jsonl row [246]: no caption .*--skip_bad_rows"):
        take(stream_of(tmp_path / "pairs.jsonl"), 4)


def test_a_broken_shard_is_named_and_the_next_one_is_read(tars, tmp_path):
    (tmp_path / "broken.json").write_text("[{]")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "torn.tar").write_bytes(Path(tars.replace("{000..003}", "003")).read_bytes()[:5000])
    shards = find_shards([f"{tmp_path}/*", tars.replace("{000..003}", "000")])
    rows = take(PairStream(shards, max_bad_share=0.5, log_folder=tmp_path), 12)
    assert {"0-0", "0-1", "0-2", "0-3", "0-4", "3-0"} <= set(captions(rows))
    assert {"broken.json", "broken.parquet", "torn.tar"} <= logged_errors(tmp_path).keys()


def damaged_tars(folder):
    """Return tar files of eight pairs that `tarfile` reads without an error, or with one after some pairs."""
    samples = [{"png": encoded(), "txt": f"{number}"} for number in range(8)]
    good = write_tar(folder / "good.tar", samples).read_bytes()
    pair = 512 * (4 + len(encoded()) // 512)  # two headers, the image and the text, in blocks of 512 bytes
    half = good[: 4 * pair]
    rest = good[4 * pair :]
    return {
        "cut between pairs": half,
        "cut in a header": half + rest[:100],
        "cut in an image": half + rest[:600],
        "cut after the last pair": good[: 8 * pair],
        "two files joined": good + good,
        "a zero block between pairs": half + bytes(512) + rest,
        "zeros in place of a header": half + bytes(1024) + rest[1024:],
        "a header of other bytes": half + b"x" * 512 + rest[512:],
    }


def test_damaged_tar_files_are_named(tmp_path):
    for name, content in damaged_tars(tmp_path).items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        zipped = tmp_path / f"{name}.tar.gz"
        zipped.write_bytes(gzip.compress(content))
        for shard in find_shards([str(path), str(zipped)]):
            *records, last = shard
            assert len(records) >= 4, name
            assert last.source == shard.name
            assert last.reason == "broken tar file"
        with pytest.raises(ValueError, match=name):
            take(stream_of(path), 9)
    good = tmp_path / "good.tar"
    (tmp_path / "good.tar.gz").write_bytes(gzip.compress(good.read_bytes()))
    assert all(len(list(shard)) == 8 for shard in find_shards([f"{good}*"]))


@pytest.mark.parametrize("column", ["image", "image_path", "file_name", "picture"])
def test_the_json_of_a_tar_file_names_no_local_file(tmp_path, column):
    """Neither a stream nor a search reads a file that a stranger's tar file names."""
    (tmp_path / "private.png").write_bytes(encoded("blue"))
    described = {"caption": "a", column: str(tmp_path / "private.png"), "image_root": str(tmp_path)}
    path = write_tar(tmp_path / "a.tar", [{"json": described}])
    (shard,) = find_shards([str(path)])
    image_column = "picture" if column == "picture" else None
    stream = PairStream([shard], max_bad_share=1.0, image_column=image_column, log_folder=tmp_path)
    with pytest.raises(ValueError, match="1 of the first 1 pairs are bad"):
        take(stream, 1)
    (row,) = rows_of(shard, image_column)
    assert row["images"] == []
    assert row["error"] is not None


def forged(name, size, kind=tarfile.REGTYPE):
    """Return the header of a member that says more than the file has."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("size", [1 << 40, -512, -(1 << 40)])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("b.png", tarfile.REGTYPE),
        ("b.mp4", tarfile.REGTYPE),
        ("b.png", b"Z"),  # an unknown type is skipped
        ("b.png", tarfile.GNUTYPE_LONGNAME),
        ("b.png", tarfile.XHDTYPE),
        ("b.png", tarfile.XGLTYPE),
        ("b.png", tarfile.GNUTYPE_SPARSE),
    ],
)
def test_a_forged_size_ends_a_shard(name, kind, size, suffix, tmp_path):
    pairs = write_tar(tmp_path / "good.tar", [{"txt": "a"}, {"txt": "not known to be whole"}])
    content = pairs.read_bytes()[:2048] + forged(name, size, kind) + bytes(2048)
    path = tmp_path / f"forged{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    record, *_, last = TarShard(str(path))
    assert record["caption"] == "a"
    assert last.reason == "broken tar file"


def zipped_zeros(path, files, kind=tarfile.REGTYPE):
    """Return a small tar file of zeros with these names and sizes in MiB."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for name, size in files.items():
            file.write(forged(name, size << 20, kind))
            for _ in range(size):
                file.write(bytes(1 << 20))
        file.write(bytes(1024))
    return TarShard(str(path))


def most_memory(records):
    """Return the most bytes that Python holds while records are read one by one."""
    tracemalloc.start()
    for _ in records:
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_the_files_of_a_pair_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_PAIR_BYTES", 8 << 20)
    files = {"a.png": 30, "b.png": 5, "b.jpg": 5, "c.txt": 2, "d.png": 5, "d.txt": 1}
    shard = zipped_zeros(tmp_path / "zeros.tar.gz", files)
    *faults, good = shard
    assert [Path(fault.source).name for fault in faults] == ["a", "b", "c"]
    assert {fault.reason for fault in faults} == {"a file too large"}
    assert len(good["image"]) == 5 << 20
    assert most_memory(shard) < 20 << 20


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_long_headers_of_a_tar_file_are_not_read(kind, tmp_path):
    shard = zipped_zeros(tmp_path / "zeros.tar.gz", {"a.png": 30}, kind)
    assert most_memory(shard) < 5 << 20


def test_a_shuffled_block_is_bounded(tmp_path, monkeypatch):
    image = strange_pictures.encoded(PIL.Image.new("RGB", (512, 680)), "BMP")  # 1 MB
    path = write_tar(tmp_path / "large.tar", [{"bmp": image, "txt": "a"} for _ in range(20)])
    monkeypatch.setattr(streams, "MAX_BLOCK_BYTES", 4_000_000)
    assert most_memory(islice(PairStream([TarShard(str(path))]), 20)) < 9_000_000


def test_too_many_bad_pairs_stop_the_stream(tmp_path):
    path = bad_tar(tmp_path, num_good=30)
    stream = stream_of(path, max_bad_share=0.05, log_folder=tmp_path)
    assert len(take(stream, 30)) == 30  # the share is not checked at the first pairs
    stream = stream_of(path, max_bad_share=0.05, log_folder=tmp_path)
    with pytest.raises(ValueError, match="--max_bad_share.*bad_pairs-00000.jsonl"):
        take(stream, 31)


def test_a_stream_without_a_good_pair_ends_with_an_error(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"image": "missing.png", "caption": "a"}\n{"caption": ')
    stream = stream_of(tmp_path / "pairs.jsonl", max_bad_share=1.0, log_folder=tmp_path)
    with pytest.raises(ValueError, match="bad_pairs-00000.jsonl.*pairs.jsonl row"):
        take(stream, 1)
