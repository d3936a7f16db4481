r"""
Plot kept patches in the tower and kept visual tokens after it for two questions about one image.

    python benchmarks/vlm_small/draw.py --model outputs/vlm_small/seed0 --output docs/vlm_scenes_kept.png
"""

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from busy_scenes import draw_scene
from contestants import llava_inputs
from small_model import GRID, NUM_PATCHES, PATCH_SIZE, WORDS, pixels_of
from small_model import encode as encode_text
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide, apply_patch_selection, record_patch_selection
from trips_examples.training.parser import make_parser


TOWER_KEPT = 24  # patches that the tower keeps
KEPT = 16  # visual tokens in the language model
KINDS = ("color", "shape")  # of the questions, about different items


@dataclass
class DrawArguments:
    model: str = field(metadata={"help": "Folder of the model from train.py with guides from evaluate.py."})
    output: str = field(default="docs/vlm_scenes_kept.png", metadata={"help": "Output figure."})
    layer: int = field(default=2, metadata={"help": "Selection layer of the tower."})


def shown(image: np.ndarray, kept: torch.Tensor) -> np.ndarray:
    """Return the image with dimmed dropped patches."""
    mask = torch.zeros(NUM_PATCHES).index_fill(0, kept, 1.0).view(GRID, GRID)
    mask = mask.repeat_interleave(PATCH_SIZE, 0).repeat_interleave(PATCH_SIZE, 1).numpy()[..., None]
    return (image * mask + (0.25 * image + 160) * (1 - mask)).clip(0, 255).astype(np.uint8)


def main(argv: list[str] | None = None):
    (args,) = make_parser(DrawArguments, description=__doc__).parse_args_into_dataclasses(argv)
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    guide = TextGuide.from_pretrained(Path(args.model) / "guides" / f"regions{args.layer}").eval()
    rate = TOWER_KEPT / NUM_PATCHES
    apply_patch_selection(model, f"{args.layer}:text:{rate:.6f}", visual_tokens=KEPT, guide=guide)
    scene = draw_scene("test", 0)
    questions, regions = [], set()
    for kind in KINDS:
        question = next(own for own in scene.questions if own.kind == kind and own.region not in regions)
        questions.append(question)
        regions.add(question.region)
    image = np.asarray(scene.image)
    figure, axes = plt.subplots(len(questions), 3, figsize=(9, 3.3 * len(questions)), squeeze=False)
    for row, question in zip(axes, questions):
        prompt = torch.tensor([encode_text(question.text)])
        with torch.no_grad(), record_patch_selection(model) as selections:
            inputs = llava_inputs(pixels_of(scene.image)[None], prompt)
            answer = WORDS[model(**inputs, logits_to_keep=1).logits[0, -1].argmax()]
        titles = (
            f"{question.text.replace(' ?', '?')} {answer}",
            f"{TOWER_KEPT} of {NUM_PATCHES} patches after tower layer {args.layer}",
            f"{KEPT} visual tokens for the language model",
        )
        views = (image, shown(image, selections[0].kept_indices[0]), shown(image, selections[1].kept_indices[0]))
        for axis, view, title in zip(row, views, titles):
            axis.imshow(view, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
