"""
Models whose visual tokens have times, rows and columns, so that their positions depend on the selection.

The places of the kept tokens travel as more columns of their embeddings, as in vLLM's own pruning of videos (EVS), and
are written before prefill.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.platforms import current_platform

from ..hosts.vlm.visual_tokens import VisualTokens
from .selection import CHOICE, RequestInputs, SelectingExit, SelectionProcessor, ServedFamily, joined_by_image


INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of the embeddings' dtype
VIDEO_INPUTS = {
    "pixel_values_videos": "pixel_values",
    "video_embeds": "image_embeds",
    "video_grid_thw": "image_grid_thw",
}
NUM_PLACES = 4  # columns of a kept token: its time, row and column, and the farthest of them that its image keeps


def always() -> bool:
    return True


class PlacedFamily(ServedFamily):
    @property
    def unit(self) -> int:
        return self.config.vision_config.spatial_merge_size


class PlacedProcessor(SelectionProcessor):
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}

    def tile_sizes(self, item: MultiModalKwargsItem, num_visual: int) -> list[int]:
        num_steps = int(item["video_grid_thw"].data[0]) if "video_grid_thw" in item else 1
        return [num_visual // num_steps] * num_steps


class PlacedExit(SelectingExit):
    """Model with positions of three numbers that drops visual tokens after its tower."""

    supports_multimodal_pruning = True
    supports_encoder_tp_data = False  # its way through the tower bypasses the layers
    family_class = PlacedFamily
    steps_are_apart = True  # text is between the time steps of a video, whose tokens have no time then

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        # vLLM asks for the positions of kept tokens only where it prunes videos. Its classes ask while they are built:
        # for the size of the table of rotary positions, and against graphs of the encoder.
        vllm_config.model_config.multimodal_config.is_multimodal_pruning_enabled = always
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def own_features(self, inputs: Mapping) -> Sequence[torch.Tensor]:
        """Return the tower's tokens of each image, with the columns of deepstack."""
        parsed = self._parse_and_validate_image_input(**inputs)
        return self._process_image_input(parsed)

    def embed_multimodal(self, **kwargs) -> Sequence[torch.Tensor]:
        modality = "video" if "video_grid_thw" in kwargs else "image"
        # Videos take the way of images whose time steps are tiles.
        kwargs = {VIDEO_INPUTS.get(name, name): value for name, value in kwargs.items()}
        if CHOICE.format(modality) not in kwargs:  # embeddings of the caller stay as they are
            groups = self.own_features(kwargs)
            whole = VisualTokens.whole(groups)
            return self.with_places(whole.features, whole.positions, kwargs)
        request = RequestInputs.of(kwargs, modality)
        num_patches = kwargs["image_grid_thw"].prod(dim=-1)
        return self.tokens_of_images(kwargs, num_patches.tolist(), request)

    def visual_tokens(self, inputs: Mapping, request: RequestInputs) -> VisualTokens:
        grids = inputs["image_grid_thw"]
        num_steps = grids[:, 0]
        steps = grids.repeat_interleave(num_steps, dim=0)
        steps[:, 0] = 1
        return super().visual_tokens({**inputs, "image_grid_thw": steps}, request)

    def join(self, tokens: VisualTokens, inputs: Mapping) -> list[torch.Tensor]:
        kept = replace(tokens, features=tokens.output).keep(tokens.positions)
        joined = joined_by_image(kept, inputs)
        return self.with_places(joined.features, joined.positions, inputs)

    def with_places(
        self, groups: Iterable[torch.Tensor], positions: list[torch.Tensor], inputs: Mapping
    ) -> list[torch.Tensor]:
        """Return the features of each image or video with its tokens' places, whose bits survive in any dtype."""
        grids = inputs["image_grid_thw"].tolist()
        seconds = inputs.get("second_per_grid_ts")
        features = []
        for number, (group, kept, (_, height, width)) in enumerate(zip(groups, positions, grids)):
            num_columns = width // self.family.unit
            num_rows = height // self.family.unit
            steps = kept // (num_rows * num_columns)
            times = self.times(steps, None if seconds is None else seconds[number])
            rows = kept // num_columns % num_rows
            columns = kept % num_columns
            places = torch.stack([times, rows, columns], dim=1)  # (num_kept, NUM_PLACES - 1)
            farthest = places.max().expand(len(places), 1)
            places = torch.cat([places, farthest], dim=1)
            bits = places.to(INTEGERS[group.itemsize]).view(group.dtype)
            features.append(torch.cat([group, bits], dim=1))
        return features

    def times(self, steps: torch.Tensor, seconds: torch.Tensor | None) -> torch.Tensor:
        """Return the first numbers of positions in these time steps, of which each has as many `seconds`."""
        if self.steps_are_apart:
            return torch.zeros_like(steps)
        per_step = 1.0 if seconds is None else float(seconds)
        per_step *= getattr(self.config.vision_config, "tokens_per_second", 1.0)
        times = steps * per_step
        return times.long()

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]):
        """
        Return positions where each visual token is at the start of its image, at its time in a video, and how far they
        are ahead.
        """
        parts = []
        position = end = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            num_steps, height, width = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
            seconds = feature.data.get("second_per_grid_ts")
            steps = torch.arange(1 if self.steps_are_apart else num_steps)
            times = self.times(steps, None if seconds is None else seconds.data)
            side = max(height, width) // self.family.unit
            for start, length in runs(feature.mm_position):
                num_before = start - end
                parts.append(torch.arange(position, position + num_before))
                position += num_before
                parts.append(position + times.repeat_interleave(length // len(steps)))
                position += max(side, int(times[-1]) + 1)
                end = start + length
        num_after = len(input_tokens) - end
        parts.append(torch.arange(position, position + num_after))
        return torch.cat(parts).repeat(3, 1), position + num_after - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Write rows and columns into the positions of the visual tokens that are about to be computed."""
        positions = mrope_positions
        if multimodal_embeddings:  # also called for every decoded token, without any
            positions = mrope_positions.clone()
            bits = torch.cat([part[:, -NUM_PLACES:] for part in multimodal_embeddings]).contiguous()
            times, rows, columns, farthest = bits.view(INTEGERS[bits.itemsize]).T.to(positions)
            ids = torch.as_tensor(input_ids, device=positions.device)
            is_image = ids == self.config.image_token_id
            is_video = ids == self.config.video_token_id
            (visual,) = torch.where(is_image | is_video)
            written = visual[visual >= num_computed_tokens][: len(rows)]
            starts = positions[0, written] - times
            positions[1, written] = starts + rows
            positions[2, written] = starts + columns
            # Tokens of the same image that are cached have no places here, and need none. What is generated counts on
            # from the farthest place, also where the image ends the prompt.
            computed = visual[visual < num_computed_tokens]
            computed = computed[positions[0, computed] >= starts[0]]
            positions[1:, computed] = starts[0] + farthest[0]
        tokens = [part[:, :-NUM_PLACES] for part in multimodal_embeddings]
        return tokens, positions, int(positions.max()) + 1 - positions.shape[1]


def runs(place: PlaceholderRange) -> Iterator[tuple[int, int]]:
    """Yield where visual tokens without text between them begin, and how many they are."""
    if place.is_embed is None:
        yield place.offset, place.length
        return
    first = place.offset
    for is_visual, run in groupby(place.is_embed.tolist()):
        length = len([*run])
        if is_visual:
            yield first, length
        first += length


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    # Unlike the runners for GPUs, this one never asks the model.
    CPUModelRunner.is_multimodal_pruning_enabled = property(
        lambda runner: isinstance(getattr(runner, "model", None), PlacedExit),
        lambda runner, value: None,
    )
