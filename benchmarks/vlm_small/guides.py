"""Training of text guides on the frozen small LLaVA, on scenes that follow those of its training."""

import PIL.Image
import torch
from small_model import IMAGE_SIZE, NUM_PATCHES, encode, llava_inputs, pixels_of
from torch import nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide, remove_patch_selection
from modeling_trips.hosts.vlm.supervision import region_masks
from trips_examples.data.busy_scenes import draw_scene
from trips_examples.train_guide import GuideArguments, GuidedModel


FIRST_SCENE = 10_000_000
STEPS = 300
SCENES_PER_STEP = 8
KEPT_IN_TRAINING = 3  # fewer than in use teach more


class ConstantGuide(TextGuide):
    """A query that is the same for all prompts: a guide that reads nothing."""

    def forward(self, prompt: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.zeros_like(prompt), prompt_mask)


def make_batch(step: int, seed: int, teacher: str) -> dict:
    """Return the inputs of `GuidedModel` for all questions about the scenes of a step, one row each."""
    first = FIRST_SCENE + step * SCENES_PER_STEP
    scenes = [draw_scene("train", number, seed) for number in range(first, first + SCENES_PER_STEP)]
    rows = [(pixels_of(scene.image), scene.questions) for scene in scenes]
    rows = [(pixels, question) for pixels, questions in rows for question in questions]
    if teacher == "regions":
        rows = [(pixels, question) for pixels, question in rows if question.region is not None]
    pixel_values = torch.stack([pixels for pixels, _ in rows])
    prompts = [encode(question.text) for _, question in rows]
    batch = {"inputs": llava_inputs(pixel_values, prompts)}
    if teacher == "regions":
        blank = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        masks = region_masks([blank] * len(rows), [question.region for _, question in rows])
        for name, images in (("masks", masks), ("blanks", [blank] * len(rows))):
            batch[name] = {**batch["inputs"], "pixel_values": torch.stack([pixels_of(image) for image in images])}
        return batch
    answered = [[*words, encode(question.answer)[0]] for words, (_, question) in zip(prompts, rows)]
    return batch | {"answered": llava_inputs(pixel_values, answered), "num_answer_tokens": [1] * len(rows)}


def train_guide(
    model: LlavaForConditionalGeneration,
    layer: int,
    teacher: str,
    seed: int,
    guide_class: type[TextGuide] = TextGuide,
    steps: int = STEPS,
    kept: int = KEPT_IN_TRAINING,
    **options,
) -> TextGuide:
    """
    Train a guide on the frozen model as `examples/train_guide.py` does.

    Args:
        teacher (`str`): `"regions"`, `"attention"` or `"answers"`, as in `examples/train_guide.py`.
        kept (`int`): Patches that a training from answers keeps.
        **options: Other fields of `GuideArguments`.
    """
    torch.manual_seed(seed)
    guide = guide_class.for_model(model, layer)
    args = GuideArguments("", layer=layer, teacher=teacher, keep_rate=kept / NUM_PATCHES, **options)
    guided = GuidedModel(guide, model, args)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-2, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc=f"guide from {teacher}", mininterval=10):
        optimizer.zero_grad()
        guided(**make_batch(step, seed, teacher))["loss"].backward()
        nn.utils.clip_grad_norm_(guide.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        scheduler.step()
    remove_patch_selection(model)
    return guide.eval()
