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
"""Files of strangers are read without running them; folders are written whole or not at all."""

import pickle
import shutil
import signal
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from .rules import ConversionError, printable


logger = logging.get_logger(__name__)

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict in a file of PyTorch or safetensors, told apart by what is in them: all of it, or its entry `model`.
    No code in the file is run.

    Raises:
        ConversionError: if the file is damaged, holds anything that is not data, or no state dict.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty. Download it again.")
    try:
        # A file of safetensors begins with the length of its header, 8 bytes, and the header, JSON.
        content = load_file(path) if start[8:] == b"{" else _read_pytorch(path)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ConversionError(
            f"{path} cannot be read as weights alone. Is the file complete? Compare its size, or download it again. "
            "If it is older than PyTorch 1.6 and you trust it, load it with `torch.load(..., weights_only=False)` and "
            f"save its weights anew. ({type(error).__name__})"
        ) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    _check_state_dict(path, content)
    return content


def _read_pytorch(path: Path):
    """What `torch.load` makes of a file, but checksums are compared, which it does not do."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ConversionError(
                f"{path} is damaged: the checksum of its part {printable(damaged)} is wrong. Download it again."
            )
    try:
        with path.open("rb") as file:  # by its name, `torch.load` may take it for another format
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # raises if it is no archive of PyTorch
        if not names:
            raise
        raise ConversionError(
            f"{path} holds more than weights: {', '.join(map(printable, names))}. Loading that can run code of the "
            "file's author. If you trust the file, take out its weights first: python -c \"import torch; "
            f"torch.save(torch.load('{path}', map_location='cpu', weights_only=False)['model'], 'weights.pth')\""
        ) from error


def _check_state_dict(path: Path, content):
    """Raises unless `content` has names and dense tensors, none of which is larger than the file they come from."""
    what = "has no entry `model`, and is no state dict itself"
    if not isinstance(content, dict):
        raise ConversionError(f"{path} {what}: it holds a {type(content).__name__}. Give a file with ALBEF's weights.")
    others = [
        printable(str(name))
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if others or not content:
        raise ConversionError(
            f"{path} {what}: it holds {', '.join(others) or 'nothing'}. Give a file with "
            "ALBEF's weights by their names."
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


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yields a path where to make what becomes `folder` when the block is over: no part of it ever stands under its own
    name. What fails, or is stopped by SIGTERM, leaves nothing behind; what earlier runs left is named in a warning.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-writing-"
    for left in sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix)):
        logger.warning(f"A run that was killed left {left} behind, or is still writing it. Remove it if none is.")
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        with _sigterm_as_exit():
            yield partial / "whole"
            (partial / "whole").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM end the process through its `finally` blocks. Only the main thread may set this up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
