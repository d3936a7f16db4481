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
"""
What a processor makes of its inputs before they become tensors: pictures of any kind to 8-bit RGB, upright and opaque;
and texts without what ALBEF takes out of questions and captions, but not of answers (its dataset/utils.py). Lower case
is left to the tokenizer, which knows special tokens.
"""

import base64
import operator
import os
import re

import httpx
import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ImageInput

from .image_decoding_trips import convert_to_rgb, decode_image


def prepare_images(images: ImageInput, patch_size: int) -> list[Image.Image | np.ndarray | torch.Tensor]:
    """
    Prepares every image of whatever a processor is given. Pictures, paths and URLs become RGB pictures; arrays and
    tensors stay as they are, but grey ones of shape `(H, W)` become `(3, H, W)`.

    Args:
        images (`ImageInput`): an image, a list of images (nested or not), or a batch `(num_images, ...)`.
        patch_size (`int`): sides below it are an error.

    Returns:
        `list`: one picture, array or tensor for each image, in order.

    Raises:
        `ValueError`: Where one cannot be used, naming its position and path, or there is none.
    """
    prepared = []
    for position, image in enumerate(_flatten_images(images)):
        try:
            prepared.append(_prepare_image(image))
            _check_image_size(prepared[-1], patch_size)
        except Exception as error:  # Pillow and the network raise many kinds: OSError, SyntaxError, struct.error, ...
            path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "")
            name = f"`images[{position}]` {path!s:.200}".rstrip()
            raise ValueError(f"{name} cannot be used: {str(error).rstrip('.')}.") from error
    if not prepared:
        raise ValueError("`images` is empty: pass at least one image, or None.")
    return prepared


def _flatten_images(images: ImageInput) -> list:
    """Makes a flat list of one image, a list of images (nested or not) or a batch (a 4-dimensional array)."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten_images(item)]
    return list(images) if getattr(images, "ndim", None) == 4 else [images]


def _prepare_image(image) -> Image.Image | np.ndarray | torch.Tensor:
    """Reads a path or URL, converts pictures to RGB; arrays pass as they are, but grey (H, W) becomes (3, H, W)."""
    if isinstance(image, (str, os.PathLike, Image.Image)):
        return read_image(image)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError(f"expected a PIL image, an array, a tensor, a path or a URL, got {type(image).__name__}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"expected a shape (H, W), (H, W, C) or (C, H, W) without zeros, got {tuple(image.shape)}")
    if image.ndim == 2:
        return (torch if isinstance(image, torch.Tensor) else np).stack([image] * 3)
    return image


def read_image(image: str | os.PathLike | Image.Image, timeout: float | None = None) -> Image.Image:
    """
    Read an image as the models see it: RGB, upright, transparent pixels on white (see [`convert_to_rgb`]).

    Args:
        image (`str`, `os.PathLike` or `PIL.Image.Image`): An image, its path or URL, or the file in base64.
        timeout (`float`, *optional*): Seconds to wait for a URL. By default without limit.

    Raises:
        `FileNotFoundError`: A string is neither a path, nor a URL, nor base64.
        `ValueError`: The file cannot be used, see [`decode_image`] for URLs and base64.
        `httpx.HTTPError`: The URL cannot be fetched.
    """
    if isinstance(image, Image.Image):
        return convert_to_rgb(image)
    if os.path.exists(image):
        with Image.open(image) as opened:
            return convert_to_rgb(opened)
    source = os.fspath(image)
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, timeout=timeout, follow_redirects=True)
        return decode_image(response.raise_for_status().content)
    try:
        return decode_image(base64.b64decode(source.partition(",")[2] if source.startswith("data:") else source))
    except ValueError as error:
        if source.startswith("data:"):
            raise
        raise FileNotFoundError("there is no such file, and it is neither a URL nor an image in base64") from error


def _check_image_size(image: Image.Image | np.ndarray | torch.Tensor, patch_size: int):
    if isinstance(image, Image.Image):
        width, height = image.size
    else:
        height, width = image.shape[1:] if image.shape[0] in (1, 3, 4) else image.shape[:2]
    if min(height, width) < patch_size:
        raise ValueError(
            f"it has {height} x {width} pixels (height x width), fewer than one patch of {patch_size} x {patch_size}: "
            "scale it up first if it is meant"
        )


def check_images_of_texts(images: list | None, text: str | list[str] | None, image_index: list | None):
    """Raises a `ValueError` unless every text has its image, by position or by `image_index`."""
    texts = [text] if isinstance(text, str) else text
    if texts is not None and not (isinstance(texts, list) and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"`text` must be a string or a list of strings, got {text!r:.200}.")
    if texts == []:
        raise ValueError("`text` is empty: pass at least one text, or None.")
    if images is None or texts is None:
        if image_index is not None:
            raise ValueError("`image_index` says which image each text is about: pass both `images` and `text`.")
        return
    num_images, num_texts = len(images), len(texts)
    if image_index is None:
        if num_images != num_texts:
            raise ValueError(
                f"Got {num_images} images and {num_texts} texts. Pass one image per text, or `image_index`, where "
                "text i is about image image_index[i]."
            )
        return
    try:
        rows = [[operator.index(index) for index in _as_list(entry)] for entry in image_index]
    except TypeError as error:
        raise ValueError(
            f"`image_index` must be a list of integers, or of lists of them, got {image_index!r:.200}."
        ) from error
    if len(rows) != num_texts:
        raise ValueError(f"`image_index` must have one entry per text: got {len(rows)} for {num_texts} texts.")
    for position, row in enumerate(rows):
        if not all(0 <= index < num_images for index in row):
            raise ValueError(
                f"`image_index[{position}]` is {image_index[position]}, but must be in [0, {num_images - 1}]."
            )


def _as_list(entry) -> list | tuple:
    return entry if isinstance(entry, (list, tuple)) else [entry]


# Texts


PUNCTUATION = re.compile(r"""[,.'!?"()*#:;~]""")


def clean_question(text: str) -> str:
    """ALBEF's `pre_question`: no punctuation; hyphens and slashes part words."""
    return re.sub("[-/]", " ", PUNCTUATION.sub("", text))


def clean_caption(text: str) -> str:
    """ALBEF's `pre_caption`: as a question, and `<person>`, which stands for a name, is a word."""
    return re.sub("<person>", "person", clean_question(text), flags=re.IGNORECASE)


TEXT_CLEANINGS = {"albef_question": clean_question, "albef_caption": clean_caption}
