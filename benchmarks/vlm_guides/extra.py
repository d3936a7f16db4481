"""The loss with square-root weights in place of the cross-entropy, for guides from relevance: python extra.py"""

import json, guides, compare, torch
from compare import *
from modeling_trips.patch_selection import selection_loss
from modeling_trips.hosts import apply_patch_selection


def loss_of(model, rows, teacher, guide, schedule):
    pixels = torch.stack([p for p, _ in rows])
    prompts = [encode(q.text) for _, q in rows]
    answered = llava_inputs(pixels, [[*w, encode(q.answer)[0]] for w, (_, q) in zip(prompts, rows)])
    targets = guides.variants(model, answered, teacher)
    selection = guides.guided_selection(model, llava_inputs(pixels, prompts))
    losses = selection_loss(selection.scores, selection.candidate_indices, targets)
    return losses.sum() / (targets.sum(dim=-1) > 0).sum().clamp(min=1)


guides.loss_of = loss_of
for seed in (5, 6):
    folder = Path(f"starts/{seed}")
    path = Path(f"rows/{seed}.json")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval().requires_grad_(False)
    name = "relevance, squares, weighted"
    guides.train_guide(model, seed, name, folder, guides.STEPS)
    own = {name: TextGuide.from_pretrained(folder / "guides" / name)}
    rows = json.loads(path.read_text())
    for split in ("validation", "test"):
        rows += [row for row in compare.measure_all(model, own, split, seed) if row["selection"] != "unpruned"]
    path.write_text(json.dumps(rows, indent=1))
