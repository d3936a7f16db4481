# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Reading of untrusted weight files without running their code."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .rules import ConversionError, printable


WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Read the state dict of a PyTorch or safetensors file, or its entry `model`. The content, not the name, determines
    the format. No code in the file is run.

    Raises:
        ConversionError: The file is damaged, has no state dict, or has anything but data.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty. Download it again.")
    try:
        # A safetensors file begins with the length of its JSON header in 8 bytes.
        content = load_file(path) if start[8:] == b"{" else _read_pytorch(path)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ConversionError(
            f"{path} cannot be read ({type(error).__name__}). Download it again; if it is older than PyTorch 1.6 and "
            "you trust it, save its weights again after `torch.load(..., weights_only=False)`."
        ) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    _check_state_dict(path, content)
    return content


def _read_pytorch(path: Path):
    """Load a file with `torch.load` after checking its checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ConversionError(f"{path} is damaged: {printable(damaged)} has a wrong checksum. Download it again.")
    try:
        with path.open("rb") as file:  # `torch.load` may choose another format by the name
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # raises if not a PyTorch archive
        if not names:
            raise
        raise ConversionError(
            f"{path} has more than weights: {', '.join(map(printable, names))}. Loading it can run code; if you trust "
            'the file, extract its weights first: python -c "import torch; '
            f"torch.save(torch.load('{path}', map_location='cpu', weights_only=False)['model'], 'weights.pth')\""
        ) from error


def _check_state_dict(path: Path, content):
    """Raise a [`ConversionError`] unless `content` maps names to dense tensors that fit the size of the file."""
    what = "has no entry `model` and is not a state dict"
    if not isinstance(content, dict):
        raise ConversionError(f"{path} {what}, got {type(content).__name__}. Give a file with ALBEF's weights.")
    others = [
        printable(str(name))
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if others or not content:
        raise ConversionError(
            f"{path} {what}, got {', '.join(others) or 'nothing'}. Give a file with ALBEF's weights."
        )
    size = path.stat().st_size
    odd = [
        printable(name)
        for name, weight in content.items()
        if weight.is_nested
        or weight.is_quantized
        or weight.layout != torch.strided
        or weight.device.type != "cpu"
        or weight.numel() * weight.element_size() > size
    ]
    if odd:
        raise ConversionError(
            f"{path} has weights that are sparse, quantized, without values or larger than the file: "
            f"{', '.join(odd)}. Save them as ordinary tensors."
        )
