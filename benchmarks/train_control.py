r"""
Train and evaluate question answering with a selection that no user would want, as a control of what each part adds.

    python benchmarks/train_control.py constant --dataset_name busy_scenes --selection_gate 0.2 ...
    python benchmarks/train_control.py tenth --dataset_name busy_scenes --selection_loss_weight 0.5 ...

`constant`: the query of an empty text scores the patches, in place of the text's own. It is learnt like the image's,
but is the same for all texts and images. `tenth`, `hundredth`: this share of the training texts has its region.
`region`: only patches of a text's region are kept, in evaluation as well; a text without a region chooses itself.
`not_fused`: dropped patches leave no token. `no_gate_at_end`: the last quarter of the steps trains without the gate.
`drawn`: patches are drawn by their scores in training without a gate, too.
The options are those of run_vqa.py.
"""

import runpy
import sys
import zlib
from functools import partial
from pathlib import Path

import torch

from modeling_trips.modeling_trips import TripsModel
from modeling_trips.modeling_trips_text import TripsTextModel, class_states
from modeling_trips.modeling_trips_vision import TripsVisionLayer
from modeling_trips.patch_selection import region_targets
from trips_examples.data.collators import VqaCollator
from trips_examples.training.options import ModelArguments
from trips_examples.training.parser import run_script
from trips_examples.training.trainer import ImageGroupedTrainer


SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "run_vqa.py"
EMPTY_TEXT = [2, 3]  # [CLS] and [SEP] of the bundled vocabulary


def use_constant_query():
    """Make the state of an empty text, [CLS] [SEP], guide the selection of all texts."""

    def pooled(self: TripsTextModel, hidden_states: torch.Tensor, attention_mask=None) -> torch.Tensor:
        states = self.encoder(self.embeddings(torch.tensor([EMPTY_TEXT], device=hidden_states.device)), None)
        return class_states(states, None).expand(len(hidden_states), -1)

    TripsTextModel.pooled = pooled
    TripsVisionLayer.draws = lambda *args: False  # a choice for all texts, like an image's


def use_few_regions(one_in: int):
    """Leave one in so many training texts its region."""
    regions = VqaCollator.regions

    def regions_of_few(self, rows: list[dict], sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        texts = (f"{row['image_id']} {row['question']}" for row in rows)
        few = [
            row if zlib.crc32(text.encode()) % one_in == 0 else {**row, "region": None}
            for row, text in zip(rows, texts)
        ]
        return regions(self, few if self.training else rows, sizes)

    VqaCollator.regions = regions_of_few


def keep_regions():
    """
    Make the region of a text choose its patches, in training and evaluation: the scores count as far as a patch lies
    in it. A text without a region keeps what it scores highest.
    """
    encode, fuse, score = VqaCollator.encode, TripsModel.fuse, TripsVisionLayer.score
    shares = torch.empty(0)  # of each text's region in each patch

    def encode_with_regions(self, images: list, image_index: list[int], rows: list[dict]) -> dict[str, torch.Tensor]:
        sizes = [(images[index].height, images[index].width) for index in image_index]
        return {**self.regions(rows, sizes), **encode(self, images, image_index, rows)}

    def fuse_by_regions(self, states, mask, pixel_values, image_index, image_cache, regions, *args, **kwargs):
        nonlocal shares
        if regions is None:
            regions = states.new_zeros(len(states), 4)
        shares = region_targets(regions, self.grid_of(pixel_values, image_cache))
        return fuse(self, states, mask, pixel_values, image_index, image_cache, regions, *args, **kwargs)

    def score_in_regions(self, query: torch.Tensor, key: torch.Tensor, selection) -> torch.Tensor:
        scores = score(self, query, key, selection)
        scores = scores * shares.where(shares.any(dim=-1, keepdim=True), 1.0)
        return scores / scores.sum(dim=-1, keepdim=True)

    VqaCollator.encode, TripsModel.fuse = encode_with_regions, fuse_by_regions
    TripsVisionLayer.score = score_in_regions
    ImageGroupedTrainer.regions_used_for = "choice"


def leave_no_fused_token():
    """Make a selection layer drop patches without a token for them."""
    overrides = ModelArguments.config_overrides
    ModelArguments.config_overrides = lambda self: overrides(self) | {"fuse_inattentive_tokens": False}


def end_without_gate():
    """Train the last quarter of the steps without the gate."""
    training_step = ImageGroupedTrainer.training_step

    def training_step_of_run(self, *args, **kwargs):
        if 4 * self.state.global_step >= 3 * self.state.max_steps:
            self.model.config.vision_config.selection_gate = 0.0
        return training_step(self, *args, **kwargs)

    ImageGroupedTrainer.training_step = training_step_of_run


def draw_without_gate():
    """Draw the kept patches in training, as with a gate."""
    TripsVisionLayer.draws = lambda *args: torch.is_grad_enabled()


CONTROLS = {
    "constant": use_constant_query,
    "tenth": partial(use_few_regions, 10),
    "hundredth": partial(use_few_regions, 100),
    "region": keep_regions,
    "not_fused": leave_no_fused_token,
    "no_gate_at_end": end_without_gate,
    "drawn": draw_without_gate,
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CONTROLS:
        CONTROLS[sys.argv[1]]()
        main = runpy.run_path(str(SCRIPT))["main"]
        run_script(partial(main, sys.argv[2:]))  # `sys.argv` keeps the control, for the row's command
    else:
        sys.exit(f"{__doc__}\nChoose one of {', '.join(CONTROLS)}.")
