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
The momentum teacher of pre-training and its queues (ALBEF, https://arxiv.org/abs/2107.07651, section 3; MoCo).

The teacher is a slow copy of the model. Its features of past batches wait in queues, as more candidates for the
contrastive loss, and its opinions soften the targets. It belongs to training, not to the model, and checkpoints of the
model do not hold it.
"""

import copy
import inspect
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from .modeling_trips_pretraining import TeacherOutput, check_captions, gather_with_gradient, num_processes, row_counts


class FeatureQueue(nn.Module):
    """
    The last `size` feature vectors, with the image ids they belong to; the oldest are overwritten. Entries that were
    never written have the id -1.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.features = nn.Buffer(torch.zeros(size, dim))
        self.ids = nn.Buffer(torch.full((size,), -1))
        self.position = nn.Buffer(torch.zeros((), dtype=torch.long))

    def behind(self, features: torch.Tensor, ids: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """The given rows and, after them, the queue's: features and ids. What is pushed later does not change them."""
        return torch.cat((features, self.features.to(features.dtype))), torch.cat((ids, self.ids))

    @torch.no_grad()
    def push(self, features: torch.Tensor, ids: torch.LongTensor):
        """Adds rows: `features` of shape `(num_rows, dim)`, `ids` of shape `(num_rows,)`, at most `size` of them."""
        size = len(self.ids)
        if len(ids) > size:
            raise ValueError(f"The queue holds {size} rows, too few for the {len(ids)} of all processes' batch.")
        slots = (self.position + torch.arange(len(ids), device=ids.device)) % size
        self.features[slots] = features.to(self.features.dtype)
        self.ids[slots] = ids
        self.position.copy_((self.position + len(ids)) % size)


class MomentumTeacher(nn.Module):
    """
    Args:
        model ([`TripsForPreTraining`]): the model that is trained. The teacher starts as its copy.
        momentum (`float`, *optional*, defaults to 0.995): share of the teacher that stays in an update.
        queue_size (`int`, *optional*, defaults to 65536): how many features of past images, and of past texts, are
            kept as candidates; at least the batch of all processes.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.995, queue_size: int = 65536):
        super().__init__()
        self.momentum = momentum
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.images = FeatureQueue(queue_size, model.config.projection_dim)
        self.texts = FeatureQueue(queue_size, model.config.projection_dim)
        self.to(model.device)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float | None = None):
        """
        After each optimizer step: `teacher = momentum * teacher + (1 - momentum) * model`. Buffers are copied; with
        several processes, from the first one, so that the teachers of all stay equal.

        Args:
            model ([`TripsForPreTraining`]): not wrapped by DistributedDataParallel. Parameters that FSDP2 shards are
                gathered one after another. A model in half precision may have a teacher in full precision.
            momentum (`float`, *optional*): in place of the teacher's own. 0 makes it a copy of the model.
        """
        momentum = self.momentum if momentum is None else momentum
        for parameter, source in zip(self.model.parameters(), model.parameters()):
            parameter.lerp_(_whole(source.detach()).to(parameter.dtype), 1.0 - momentum)
        for buffer, source in zip(self.model.buffers(), model.buffers()):
            buffer.copy_(source)
            if num_processes() > 1:
                distributed.broadcast(buffer, src=0)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        mlm_input_ids: torch.LongTensor | None = None,
    ) -> TeacherOutput:
        """
        Compute the teacher's view of a batch. Arguments are those of [`TripsForPreTraining`].

        Raises:
            ValueError: `image_ids` is missing, without which the images in the queues cannot be told apart.
        """
        teacher, config = self.model.eval(), self.model.config
        output: dict = {}
        image_cache = teacher.model.encode_images(pixel_values)
        # CODEPATH: an objective of weight 0 needs nothing from the teacher.
        if config.itc_weight > 0:
            if image_ids is None:
                raise ValueError("`image_ids` is missing: the teacher's queues hold images of past batches.")
            texts = teacher.get_text_features(input_ids, attention_mask, token_type_ids).pooler_output
            images = teacher.get_image_features(image_cache=image_cache).pooler_output
            output |= {
                "image_embeds": images,
                "text_embeds": texts,
                **self._candidates(images, texts, image_index, image_ids),
            }
        # CODEPATH: as above.
        if config.mlm_weight > 0 and mlm_input_ids is not None:
            output["mlm_logits"] = teacher.guess_words(
                mlm_input_ids, attention_mask, token_type_ids, image_index, image_cache
            )
        return TeacherOutput(**output)

    def _candidates(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        image_index: torch.LongTensor | None,
        image_ids: torch.LongTensor,
    ) -> dict:
        """The features of this batch, from all processes, followed by those in the queues."""
        image_index, image_ids = check_captions(text_embeds, len(image_embeds), image_index, image_ids)
        text_ids = image_ids[image_index]
        image_counts, text_counts = row_counts(image_ids, text_ids)
        images = tuple(gather_with_gradient(rows, image_counts) for rows in (image_embeds, image_ids))
        texts = tuple(gather_with_gradient(rows, text_counts) for rows in (text_embeds, text_ids))
        return {
            "images": self.images.behind(*images),
            "texts": self.texts.behind(*texts),
            "num_images": len(images[1]),
            "num_texts": len(texts[1]),
        }

    def push(self, output: TeacherOutput):
        """Add the features of a batch to the queues."""
        if output.images is not None:
            self.images.push(*(rows[: output.num_images] for rows in output.images))
            self.texts.push(*(rows[: output.num_texts] for rows in output.texts))

    def teach(self, inputs: dict, weight: float) -> dict:
        """Add the teacher's view to the inputs of a [`TripsForPreTraining`], with its weight in the targets."""
        names = [name for name in inspect.signature(MomentumTeacher.forward).parameters if name in inputs]
        return {**inputs, "teacher": self(**{name: inputs[name] for name in names}), "teacher_weight": weight}

    def save(self, folder: str | Path):
        """Writes `momentum.safetensors`, by way of a temporary file."""
        target = Path(folder) / "momentum.safetensors"
        temporary = target.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in self._own_state().items()}, temporary)
        os.replace(temporary, target)

    def load(self, folder: str | Path):
        """
        Reads what `save` wrote.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is the teacher of another model, or its queues are of another size.
        """
        path = Path(folder) / "momentum.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: without the momentum teacher this run cannot go on.")
        saved, own = load_file(path), self._own_state()
        shapes, own_shapes = ({name: tuple(value.shape) for name, value in state.items()} for state in (saved, own))
        if shapes != own_shapes:
            different = sorted(dict(shapes.items() ^ own_shapes.items()))
            found = ", ".join(f"{name} {shapes.get(name)}, not {own_shapes.get(name)}" for name in different[:5])
            raise ValueError(f"{path} does not fit this run's model and queue size: it has {found}.")
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def _own_state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, each tied one once."""
        return dict(self.named_parameters()) | dict(self.named_buffers())


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself, or all of it where FSDP2 left each process a part."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
