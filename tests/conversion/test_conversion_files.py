"""Untrusted files are read or refused without executing code."""

import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from modeling_trips.conversion.files import read_weights
from modeling_trips.conversion.rules import ConversionError


WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(500)}


@pytest.fixture
def path(tmp_path):
    torch.save({"model": WEIGHTS, "epoch": 3}, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def assert_read(path):
    weights = read_weights(path)
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in WEIGHTS.items())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.bin"])
def test_format_depends_on_content_not_on_name(tmp_path, path, name):
    save_file(WEIGHTS, tmp_path / name)
    assert_read(tmp_path / name)
    path.replace(tmp_path / name)
    assert_read(tmp_path / name)
    torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_read(tmp_path / name)


@pytest.mark.parametrize("share", [0, 0.05, 0.95])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file_raises(path, kind, share):
    if kind == "legacy":
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match="file.pth"):
        read_weights(path)


def test_flipped_bytes_are_found_by_the_checksum(path):
    with zipfile.ZipFile(path) as archive:
        part = next(name for name in archive.namelist() if name.endswith("data/1"))
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<f", 1.0) * 100)
    content[place + 3] ^= 0x40  # 1.0 becomes 1e38
    path.write_bytes(content)
    assert torch.load(path)["model"]["b"].max() > 1e29  # no error
    with pytest.raises(ConversionError, match=part):
        read_weights(path)


@pytest.mark.parametrize("content", [[torch.ones(3)], {"model": {}}, {"model": torch.ones(3)}, {"a\x1b[2J": 1}])
def test_other_content_than_a_state_dict_raises(path, content):
    torch.save(content, path)
    with pytest.raises(ConversionError, match="file.pth") as error:
        read_weights(path)
    assert str(error.value).isprintable()


ODD = {
    "sparse": torch.eye(3).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "without values": torch.empty(3, device="meta"),
    "larger than the file": torch.zeros(1).expand(10**12, 768),  # of one stored number
}


@pytest.mark.parametrize("kind", ODD)
def test_unusual_tensors_raise(path, kind):
    torch.save({"a": torch.ones(2), "odd.one": ODD[kind]}, path)
    with pytest.raises(ConversionError, match="odd.one"):
        read_weights(path)
