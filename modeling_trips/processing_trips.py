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
"""Processor class for TRIPS: images and texts to tensors, and back to answers and patch boxes."""

from .configuration_trips import TripsConfig  # isort: skip

import base64
import os
import re

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image
from transformers import BlipImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_transforms import center_to_corners_format, corners_to_center_format
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import ModelOutput, auto_docstring, logging

from .image_decoding_trips import convert_to_rgb, decode_image, open_image


# Inputs before they become tensors


def prepare_images(images: ImageInput) -> list[Image.Image | np.ndarray | torch.Tensor]:
    """
    Prepare the images of a call. PIL images, paths and URLs become RGB images. Arrays and tensors are unchanged,
    except that grey ones of shape `(H, W)` become `(3, H, W)`.

    Raises:
        `ValueError`: An image cannot be used; the message names its position and path. Or there is none.
    """
    prepared = []
    for position, image in enumerate(_flatten_images(images)):
        try:
            prepared.append(_prepare_image(image))
        except Exception as error:  # Pillow and the network raise many kinds: OSError, SyntaxError, struct.error, ...
            path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "")
            name = f"`images[{position}]` {path!s:.200}".rstrip()
            raise ValueError(f"{name} cannot be used: {str(error).rstrip('.')}.") from error
    if not prepared:
        raise ValueError("`images` is empty: pass at least one image, or None.")
    return prepared


def _flatten_images(images: ImageInput) -> list:
    """Return a flat list of one image, a list of images (nested or not) or a batch (a 4-dimensional array)."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten_images(item)]
    if getattr(images, "ndim", None) == 4:
        return list(images)
    return [images]


def _prepare_image(image) -> Image.Image | np.ndarray | torch.Tensor:
    """Read, convert and check one image, see `prepare_images`."""
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        return read_image(image)
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"expected a shape (H, W), (H, W, C) or (C, H, W) without zeros, got {tuple(image.shape)}")
    if image.ndim == 3:
        return image
    library = torch if isinstance(image, torch.Tensor) else np
    return library.stack([image] * 3)  # (3, H, W)


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
        with open_image(image) as opened:
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


def check_images_of_texts(images: list | None, texts: list[str] | None, image_index: list | None):
    """Raise a `ValueError` unless every text has an image, by position or by `image_index`."""
    if texts is not None and not (isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"`text` must be a string or a list of at least one string, got {texts!r:.200}.")
    if images is None or texts is None:
        if image_index is not None:
            raise ValueError("`image_index` needs both `images` and `text`.")
        return
    num_images = len(images)
    num_texts = len(texts)
    if image_index is None:
        if num_images != num_texts:
            raise ValueError(
                f"Got {num_images} images and {num_texts} texts. Pass one image per text, or `image_index`, the image "
                "of each text."
            )
        return
    index = np.asarray(image_index)
    has_row_per_text = index.shape[:1] == (num_texts,) and np.issubdtype(index.dtype, np.integer)
    if not has_row_per_text or (index < 0).any() or (index >= num_images).any():
        raise ValueError(
            f"`image_index` must have {num_texts} entries, one per text, in [0, {num_images - 1}], got "
            f"{image_index!r:.200}."
        )


# Texts


PUNCTUATION = re.compile(r"""[,.'!?"()*#:;~]""")


def clean_question(text: str) -> str:
    """Remove punctuation and split words at hyphens and slashes, as ALBEF's `pre_question`."""
    return re.sub("[-/]", " ", PUNCTUATION.sub("", text))


def clean_caption(text: str) -> str:
    """Clean as a question and replace `<person>` by a word, as ALBEF's `pre_caption`."""
    return re.sub("<person>", "person", clean_question(text), flags=re.IGNORECASE)


TEXT_CLEANINGS = {"albef_question": clean_question, "albef_caption": clean_caption}


# The models read the text of one message.
CHAT_TEMPLATE = """
{%- if messages | length != 1 or messages[0]["role"] != "user" -%}
    {{- raise_exception("A chat must be one message of the user: an image with a question or a prompt.") -}}
{%- endif -%}
{%- set content = messages[0]["content"] -%}
{%- if content is string -%}
    {{- content -}}
{%- else -%}
    {%- for part in content if part["type"] == "text" -%}
        {{- part["text"] -}}{%- if not loop.last %} {% endif -%}
    {%- endfor -%}
{%- endif -%}
""".strip()

logger = logging.get_logger(__name__)

# With `max_length` alone, a tokenizer truncates unless `truncation=False`.
TEXT_KWARGS = {"padding": True, "truncation": False}

# Tolerance of boxes beyond the image, in pixels, as annotations are rounded.
BOX_TOLERANCE = 1.0


def _resized(sizes: torch.Tensor, size: dict[str, int]) -> torch.Tensor:
    """Return the sizes of images, `(num_images, 2)` as (height, width), after the resize to `size`."""
    if set(size) == {"height", "width"}:
        return sizes.new_tensor((size["height"], size["width"])).expand_as(sizes)
    if set(size) == {"shortest_edge"}:
        return (size["shortest_edge"] * sizes / sizes.amin(dim=-1, keepdim=True)).floor()
    raise ValueError(
        "Boxes cannot be traced back: the image processor must resize to 'height' and 'width' or to a "
        f"'shortest_edge', got `size={size}`."
    )


def _in_original(
    pixels: torch.Tensor, original: torch.Tensor, resized: torch.Tensor, start: torch.Tensor
) -> torch.FloatTensor:
    """Return boxes in `pixel_values` as boxes in the original image, clipped to it. See `_pixel_frames`."""
    return ((pixels + start) * original / resized).clamp(min=0).minimum(original).float()


def _has_no_area(boxes: torch.Tensor) -> torch.BoolTensor:
    """Return a mask of the boxes (x0, y0, x1, y1) that are empty or inverted."""
    return (boxes[:, :2] >= boxes[:, 2:]).any(dim=-1)


def _refuse_boxes(boxes: torch.Tensor, image_sizes: torch.Tensor, rows: torch.BoolTensor, problem: str):
    """Raise a `ValueError` about the first of the boxes at `rows`. `image_sizes` are (width, height, ...)."""
    if rows.any():
        row = rows.nonzero()[0].item()
        width, height = image_sizes[row, :2].long().tolist()
        raise ValueError(
            f"`boxes[{row}]` {boxes[row].tolist()} in an image of {height} x {width} pixels (height x width) "
            f"{problem}."
        )


def _join_words(text: str) -> str:
    """Remove the spaces that a WordPiece decoder puts around punctuation within numbers and words."""
    text = re.sub(r"(?<=\d)\s*([.,:/])\s*(?=\d)", r"\1", text)
    return re.sub(r"(?<=\w)\s*(['\-])\s*(?=\w)", r"\1", text)


# trf-ignore: TRF019 (until 5.22, Transformers reads defaults from here alone)
class TripsProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {"text_kwargs": TEXT_KWARGS}


@auto_docstring
class TripsProcessor(ProcessorMixin):
    valid_processor_kwargs = TripsProcessorKwargs
    text_kwargs = TEXT_KWARGS

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 16,
        text_cleaning: str | None = None,
        chat_template=None,
    ):
        r"""
        image_processor (`BaseImageProcessor`, *optional*):
            Any image processor of Transformers. The default is a [`BlipImageProcessor`], which resizes images to
            384 x 384 pixels (bicubic) and normalizes by CLIP's mean and standard deviation, as ALBEF does.
        patch_size (`int`, *optional*, defaults to 16):
            Side of the vision tower's square patches, in pixels of `pixel_values`. Must be the model's.
        text_cleaning (`str`, *optional*):
            Cleaning of texts, but not of answers, before they are tokenized. `"albef_question"` and `"albef_caption"`
            remove punctuation as ALBEF does, for its converted checkpoints. By default none.
        chat_template (`str`, *optional*):
            Jinja template of chat messages. The default returns the text of one user message.
        """
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"`patch_size` must be a positive integer, got {patch_size!r}.")
        if text_cleaning not in (None, *TEXT_CLEANINGS):
            raise ValueError(f"`text_cleaning` must be None or one of {[*TEXT_CLEANINGS]}, got {text_cleaning!r}.")
        self.patch_size = patch_size
        self.text_cleaning = text_cleaning
        image_processor = BlipImageProcessor() if image_processor is None else image_processor
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @auto_docstring
    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        image_index: list[int] | list[list[int]] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        images (`ImageInput`, *optional*):
            One image or several, of any size: PIL images of any mode (see [`convert_to_rgb`]), arrays or tensors
            ((H, W), (H, W, C) or (C, H, W)), paths, URLs or base64 strings (which lose their alpha channel). A string
            is opened or fetched: do not pass on strings from strangers.
        text (`str` or `list[str]`, *optional*):
            One text or several, padded to the longest by default and cut only with `truncation=True`. An empty text is
            the prompt of unprompted captioning.
        image_index (`list[int]` or `torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text `i` is about image `image_index[i]`; an image with several texts is prepared once. By default text `i`
            is about image `i`. With shape `(num_texts, images_per_text)`, text `i` is about several images (NLVR2).

        Returns:
            [`BatchFeature`] with the fields below, tensors if `return_tensors` is set.

            - **pixel_values** (`num_images, 3, height, width`), float32, if `images` is given.
            - **input_ids** and **attention_mask** (`num_texts, sequence_length`), int64, if `text` is given, and
              **token_type_ids** of the same shape if the tokenizer makes them.
            - **image_index**, int64, of the shape of `image_index`, if that is given.

        Raises:
            `ValueError`: An image that cannot be read; a text with more tokens than the tokenizer's
            `model_max_length`; as many images as texts are needed but not there; an `image_index` that is out of
            range; an argument of another type. The message names the position of an image or a text.
        """
        if isinstance(image_index, (np.ndarray, torch.Tensor)):
            image_index = image_index.tolist()
        if images is not None:
            images = prepare_images(images)
        if isinstance(text, str):
            text = [text]
        check_images_of_texts(images, text, image_index)
        if text is not None:
            text = self.clean_texts(text)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if text is not None:
            self._check_lengths(
                inputs["input_ids"], name="text", remedy="Shorten it, or pass `truncation=True` to cut it"
            )
        if image_index is not None:
            tensor_types = {torch.Tensor: "pt", np.ndarray: "np"}
            tensor_type = tensor_types.get(type(inputs["input_ids"]))
            inputs.update(BatchFeature({"image_index": image_index}, tensor_type=tensor_type))
        return inputs

    def clean_texts(self, texts: list[str]) -> list[str]:
        """Return the texts as they are tokenized, according to `text_cleaning`. A call does this itself."""
        if self.text_cleaning is None:
            return texts
        clean = TEXT_CLEANINGS[self.text_cleaning]
        return [clean(text) for text in texts]

    def max_text_length(self, config: TripsConfig) -> int:
        """Return how many tokens a text may have, special ones included, for a model with `config`."""
        return min(self.tokenizer.model_max_length, config.text_config.max_position_embeddings)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As in Transformers; the processor itself keeps no `auto_map`."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.__dict__.pop("auto_map", None)
        return files

    def _check_lengths(self, rows, name: str, remedy: str):
        """Raise a `ValueError` if the token ids of a text are more than the tokenizer allows, without padding."""
        limit = self.tokenizer.model_max_length
        for position, row in enumerate(rows):
            is_text = np.asarray(row) != self.tokenizer.pad_token_id
            length = int(is_text.sum())
            if length > limit:
                raise ValueError(
                    f"`{name}[{position}]` has {length} tokens with the special ones, but only {limit} are allowed. "
                    f"{remedy}."
                )

    def encode_answers(self, answers: list[str]) -> torch.LongTensor:
        """
        Return the `labels` of a model that writes answers, or the `answer_ids` of `rank_answers`.

        Args:
            answers (`list[str]`): One or more answers, none of them empty. The first time that one has words
                that the tokenizer does not know, a warning says so, since a model cannot write its unknown token.

        Returns:
            `torch.LongTensor` of shape `(num_answers, answer_length)`: Token ids without a start token, ending with
            the tokenizer's [SEP], padded with -100.

        Raises:
            `ValueError`: `answers` is not a list of texts, or an answer has no tokens or more than the tokenizer's
            `model_max_length`.
        """
        answers = answers if isinstance(answers, str) else list(answers)
        if not answers or isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"`answers` must be a list of at least one text, got {answers!r:.200}.")
        rows = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        for position, (answer, row) in enumerate(zip(answers, rows)):
            if not row:
                raise ValueError(f"`answers[{position}]` ({answer!r}) has no tokens.")
            if self.tokenizer.unk_token_id in row:
                logger.warning_once("Answers have words that the tokenizer does not know, which no model can write.")
        rows = [torch.tensor([*row, self.tokenizer.sep_token_id]) for row in rows]
        self._check_lengths(rows, name="answers", remedy="Shorten it")
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def post_process_answers(self, sequences: torch.LongTensor | list[list[int]]) -> list[str]:
        """
        Return the answers or captions of generated token ids.

        Args:
            sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)` or `list[list[int]]`):
                Output of `generate`.

        Returns:
            `list[str]`: One text per sequence, without special tokens. WordPiece tokenizers, as BERT's, do not keep
            the spaces of a text: numbers, times and words that they split are joined ("2.5", "10:30", "t-shirt").
        """
        return self.post_process_image_text_to_text(sequences)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """As `post_process_answers`, for the `image-text-to-text` pipeline."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # missing in tokenizers in Python
        if backend is None or type(backend.decoder).__name__ == "WordPiece":
            texts = map(_join_words, texts)
        return [text.strip() for text in texts]

    def patch_boxes(
        self,
        patch_indices: torch.LongTensor,
        image_sizes: torch.LongTensor | list[tuple[int, int]],
    ) -> list[torch.Tensor]:
        """
        Return the boxes of kept patches in the original images. The settings of the image processor tell how
        `pixel_values` were resized and cropped; options of a single call do not count.

        Args:
            patch_indices (`torch.LongTensor` of shape `(batch_size, num_tokens)`, or a list of tensors):
                Row-major index of each kept patch in the grid of `pixel_values`. -1 marks a fused token and -2
                padding, which have no box.
            image_sizes (`torch.LongTensor` of shape `(batch_size, 2)` or `list[tuple[int, int]]`):
                (height, width) of each original image in pixels, after its EXIF orientation is applied. Pillow's
                `image.size` is (width, height).

        Returns:
            `list[torch.Tensor]`: Per item a float32 tensor of shape `(num_kept, 4)`: boxes (x0, y0, x1, y1) in pixels
            of the original image, in the order of `patch_indices`, clipped to the image. A patch that only saw the
            padding of a center crop has an empty box.

        Raises:
            `ValueError`: The lengths differ, an index is out of the grid, or the resize (padding, `longest_edge`, ...)
            cannot be traced back.
        """
        if len(patch_indices) != len(image_sizes):
            raise ValueError(f"Got {len(patch_indices)} rows of `patch_indices` and {len(image_sizes)} `image_sizes`.")
        original, resized, start, frame = self._pixel_frames(image_sizes)
        boxes = []
        for position, indices in enumerate(patch_indices):
            indices = torch.as_tensor(indices).cpu()
            columns, rows = (frame[position, :2] // self.patch_size).int().tolist()  # of the grid
            outside = indices[(indices < -2) | (indices >= rows * columns)]
            if len(outside):
                raise ValueError(
                    f"`patch_indices[{position}]` must be in [0, {rows * columns - 1}], as the grid has {rows} x "
                    f"{columns} patches, -1 for a fused token, or -2 for padding, got {int(outside[0])}."
                )
            kept = indices[indices >= 0]
            row = kept // columns
            column = kept % columns
            pixels = self.patch_size * torch.stack((column, row, column + 1, row + 1), dim=-1)
            boxes.append(_in_original(pixels, original[position], resized[position], start[position]))
        return boxes

    def encode_boxes(
        self,
        boxes: torch.Tensor | list[list[float]],
        image_sizes: torch.LongTensor | list[tuple[int, int]],
    ) -> torch.FloatTensor:
        """
        Return the `labels` of a [`TripsForVisualGrounding`] for boxes in the original images.

        Args:
            boxes (`torch.Tensor` of shape `(num_boxes, 4)` or `list[list[float]]`):
                Corners (x0, y0, x1, y1) in pixels of the original image, upright. Annotations are rounded: up to one
                pixel beyond the image is cut off.
            image_sizes (`torch.LongTensor` of shape `(num_boxes, 2)` or `list[tuple[int, int]]`):
                (height, width) of each box's image, as in `patch_boxes`.

        Returns:
            `torch.FloatTensor` of shape `(num_boxes, 4)`: (center_x, center_y, width, height) in [0, 1] of the image
            in `pixel_values`. Of a box that a center crop cuts, it is the part inside.

        Raises:
            `ValueError`: The lengths differ; a box, named by its row, that is empty, inverted, not finite, outside of
            its image or of the center crop; a way of resizing that cannot be traced (padding, `longest_edge`, ...).
        """
        boxes = torch.as_tensor(boxes, dtype=torch.float64, device="cpu")
        if boxes.shape != (len(image_sizes), 4):
            raise ValueError(
                f"`boxes` must have shape ({len(image_sizes)}, 4), one box per entry of `image_sizes`, got "
                f"{tuple(boxes.shape)}."
            )
        original, resized, start, frame = self._pixel_frames(image_sizes)
        not_finite = ~boxes.isfinite().all(dim=-1)
        outside = ((boxes < -BOX_TOLERANCE) | (boxes > original + BOX_TOLERANCE)).any(dim=-1)
        _refuse_boxes(boxes, original, not_finite, "has a number that is not finite")
        _refuse_boxes(boxes, original, _has_no_area(boxes), "is not (x0, y0, x1, y1) with x0 < x1 and y0 < y1")
        _refuse_boxes(boxes, original, outside, "reaches out of the image")
        in_image = boxes.clamp(min=0).minimum(original)
        in_frame = in_image * resized / original - start
        inside = in_frame.clamp(min=0).minimum(frame)
        _refuse_boxes(boxes, original, _has_no_area(inside), "has no part that `pixel_values` show")
        return corners_to_center_format(inside / frame).float()

    def post_process_grounding(
        self,
        outputs: ModelOutput | torch.Tensor,
        target_sizes: torch.LongTensor | list[tuple[int, int]],
    ) -> torch.FloatTensor:
        """
        Return the boxes of a [`TripsForVisualGrounding`] in pixels of the original images.

        Args:
            outputs ([`TripsVisualGroundingOutput`] or `torch.Tensor` of shape `(num_texts, 4)`):
                What the model returned, or its `pred_boxes`.
            target_sizes (`torch.LongTensor` of shape `(num_texts, 2)` or `list[tuple[int, int]]`):
                (height, width) of each text's original image, as in `patch_boxes`.

        Returns:
            `torch.FloatTensor` of shape `(num_texts, 4)`, on the CPU: corners (x0, y0, x1, y1), clipped to the image.
            A box in the padding of a center crop is empty.

        Raises:
            `ValueError`: The lengths differ, or the way of resizing cannot be traced back.
        """
        boxes = outputs.pred_boxes if isinstance(outputs, ModelOutput) else torch.as_tensor(outputs)
        if boxes.shape != (len(target_sizes), 4):
            raise ValueError(
                f"The boxes must have shape ({len(target_sizes)}, 4), one box per entry of `target_sizes`, got "
                f"{tuple(boxes.shape)}."
            )
        original, resized, start, frame = self._pixel_frames(target_sizes)
        pixels = center_to_corners_format(boxes.detach().cpu().double()) * frame
        return _in_original(pixels, original, resized, start)

    def _pixel_frames(self, image_sizes: torch.LongTensor | list[tuple[int, int]]) -> list[torch.Tensor]:
        """
        How `pixel_values` lie on images. Per image, each of shape (num_images, 4) as (x, y, x, y), float64: its size,
        its size after the resize, start and size of the crop.
        """
        processor = self.image_processor
        if getattr(processor, "do_pad", None):
            raise ValueError("Boxes cannot be traced back: the image processor pads (`do_pad=True`).")
        sizes = torch.as_tensor(image_sizes, dtype=torch.float64, device="cpu").view(len(image_sizes), 2)
        resized = sizes
        if processor.do_resize:
            size = get_size_dict(processor.size, default_to_square=processor.default_to_square)
            resized = _resized(sizes, size)
        start = torch.zeros_like(sizes)
        crop_size = resized
        if getattr(processor, "do_center_crop", None):
            crop = get_size_dict(processor.crop_size, param_name="crop_size")
            crop_size = sizes.new_tensor((crop["height"], crop["width"])).expand_as(sizes)
            # Towards zero, as the image processors round; a crop larger than the image starts left of it.
            start = ((resized - crop_size) / 2).trunc()
        return [sides.flip(-1).repeat(1, 2) for sides in (sizes, resized, start, crop_size)]


TripsProcessor.register_for_auto_class()

__all__ = ["TripsProcessor"]
