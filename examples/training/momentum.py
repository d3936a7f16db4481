"""
The momentum teacher of pre-training and its queues (ALBEF, https://arxiv.org/abs/2107.07651, section 3; MoCo).

The teacher is a moving average of the model. Queues hold its features of past batches, which are more candidates for
the contrastive loss, and its outputs soften the targets. Checkpoints of the model do not hold the teacher.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import distributed, nn

from modeling_trips import SelectionSchedule
from modeling_trips.inspection.files import whole_file
from modeling_trips.modeling_trips_pretraining import (
    TeacherOutput,
    check_captions,
    gather_with_gradient,
    num_processes,
    row_counts,
)


class FeatureQueue(nn.Module):
    """The last `size` feature vectors and their image ids. The id of empty entries is -1."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.features = nn.Buffer(torch.zeros(size, dim))
        self.ids = nn.Buffer(torch.full((size,), -1))
        self.position = nn.Buffer(torch.zeros((), dtype=torch.long))

    def behind(self, features: torch.Tensor, ids: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """Return features and ids of the given rows, followed by the queue's. Later pushes do not change them."""
        queued = self.features.to(features.dtype)
        return torch.cat((features, queued)), torch.cat((ids, self.ids))

    @torch.no_grad()
    def push(self, features: torch.Tensor, ids: torch.LongTensor):
        """Add at most `size` rows: `features` of shape `(num_rows, dim)`, `ids` of shape `(num_rows,)`."""
        size = len(self.ids)
        if len(ids) > size:
            raise ValueError(
                f"The queue holds {size} rows, fewer than the {len(ids)} of all processes' batch. Raise `queue_size`."
            )
        slots = (self.position + torch.arange(len(ids), device=ids.device)) % size
        self.features[slots] = features.to(self.features.dtype)
        self.ids[slots] = ids
        self.position.copy_((self.position + len(ids)) % size)


class MomentumTeacher(nn.Module):
    """
    Momentum teacher with a queue of image features and a queue of text features.

    Args:
        model ([`TripsForPreTraining`]): the model that is trained. The teacher starts as its copy.
        momentum (`float`, *optional*, defaults to 0.995): share of the teacher that an update keeps.
        queue_size (`int`, *optional*, defaults to 65536): size of each queue; at least the batch of all processes.
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
        Set `teacher = momentum * teacher + (1 - momentum) * model`, after each optimizer step. Buffers are copied from
        the first process, so that the teachers of all processes stay equal. The model is not wrapped by
        DistributedDataParallel; FSDP2's sharded parameters are gathered one after another.
        """
        if momentum is None:
            momentum = self.momentum
        for parameter, source in zip(self.model.parameters(), model.parameters()):
            new = source.detach()
            if hasattr(new, "full_tensor"):  # FSDP2 shards it
                new = new.full_tensor()
            parameter.lerp_(new.to(parameter.dtype), 1.0 - momentum)
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
        schedule: SelectionSchedule | None = None,
        **others,
    ) -> TeacherOutput:
        """Compute the teacher's output for a batch. Arguments are those of [`TripsForPreTraining`]."""
        teacher = self.model.eval()
        config = teacher.config
        output: dict = {}
        image_cache = teacher.model.encode_images(pixel_values, schedule=schedule)
        # An objective of weight 0 does not need the teacher.
        if config.itc_weight > 0:
            if image_ids is None:
                raise ValueError("`image_ids` is missing. The teacher's queues need the id of each image.")
            texts = teacher.get_text_features(input_ids, attention_mask, token_type_ids).pooler_output
            images = teacher.get_image_features(image_cache=image_cache, schedule=schedule).pooler_output
            output |= {"image_embeds": images, "text_embeds": texts}
            output |= self._candidates(images, texts, image_index, image_ids)
        if config.mlm_weight > 0 and mlm_input_ids is not None:
            output["mlm_logits"] = teacher.masked_token_logits(
                mlm_input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                image_index=image_index,
                image_cache=image_cache,
                schedule=schedule,
            )
        return TeacherOutput(**output)

    def _candidates(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        image_index: torch.LongTensor | None,
        image_ids: torch.LongTensor,
    ) -> dict:
        """Return the features of the batch of all processes, followed by those in the queues."""
        image_index, image_ids = check_captions(text_embeds, len(image_embeds), image_index, image_ids)
        text_ids = image_ids[image_index]
        image_counts, text_counts = row_counts(image_ids, text_ids)
        image_embeds = gather_with_gradient(image_embeds, image_counts)
        image_ids = gather_with_gradient(image_ids, image_counts)
        text_embeds = gather_with_gradient(text_embeds, text_counts)
        text_ids = gather_with_gradient(text_ids, text_counts)
        return {
            "images": self.images.behind(image_embeds, image_ids),
            "texts": self.texts.behind(text_embeds, text_ids),
            "num_images": len(image_ids),
            "num_texts": len(text_ids),
        }

    def push(self, output: TeacherOutput):
        """Add the features of a batch to the queues."""
        if output.images is not None:
            image_embeds, image_ids = output.images
            text_embeds, text_ids = output.texts
            self.images.push(image_embeds[: output.num_images], image_ids[: output.num_images])
            self.texts.push(text_embeds[: output.num_texts], text_ids[: output.num_texts])

    def teach(self, inputs: dict, weight: float) -> dict:
        """Add the teacher's output and its weight to the inputs of [`TripsForPreTraining`]."""
        return {**inputs, "teacher": self(**inputs), "teacher_weight": weight}

    def save(self, folder: str | Path):
        """Write `momentum.safetensors` atomically."""
        with whole_file(Path(folder, "momentum.safetensors")) as partial:
            save_model(self, str(partial))

    def load(self, folder: str | Path):
        """Read the file that `save` wrote. Raise a `ValueError` if it is of another architecture or queue size."""
        try:
            load_model(self, Path(folder, "momentum.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"{folder} does not fit this run's model and queue size: {error}") from error
