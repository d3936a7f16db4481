r"""
Accuracy and time of frozen small LLaVAs that keep a share of their visual tokens, of the same calls.

    OMP_NUM_THREADS=1 python starts.py 0 starts/0                              # for each seed
    OMP_NUM_THREADS=1 python rates.py starts vlm_rates.json 0 1 2
"""

import json
import sys
from pathlib import Path

import torch
from compare import BATCH, KINDS, TEST_SCENES, Contestant, questions_of, total_mmacs
from small import NUM_PATCHES, llava_inputs
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import apply_patch_selection
from modeling_trips.inspection.provenance import provenance
from modeling_trips.inspection.speed import seconds_in_turns

RATES = (0.5, 0.25, 0.1)
LAYER = 3  # of the tower, where the image chooses

torch.set_num_threads(1)


def contestants(folder):
    """Return the models by names, with their fields of a row."""
    names = [("unpruned", 1.0)]
    names += [(way, rate) for rate in RATES for way in ("divprune, after the tower", "image in layer 3")]
    models = {}
    for way, rate in names:
        model = LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval().requires_grad_(False)
        kept = -int(-rate * NUM_PATCHES // 1)
        own = Contestant(way, kept, kept)
        if way.startswith("divprune"):
            apply_patch_selection(model, keep_rate=rate)
            own = Contestant(way, kept, kept, scorer="divprune")
        elif way.startswith("image"):
            apply_patch_selection(model, f"{LAYER}:image:{rate}")
            own = Contestant(way, kept, kept, layer=LAYER)
        models[own] = model
    return models


def main(folder, output, *seeds):
    rows = []
    for seed in map(int, seeds):
        models = contestants(Path(folder) / str(seed))
        questions = questions_of("test", TEST_SCENES, seed)
        seconds = dict.fromkeys(models, 0.0)
        correct = {own: torch.zeros(len(questions)) for own in models}
        by_length = {}
        for number, question in enumerate(questions):
            by_length.setdefault(len(question[1]), []).append(number)
        for alike in by_length.values():
            for numbers in torch.tensor(alike).split(BATCH):
                asked = [questions[number] for number in numbers]
                inputs = llava_inputs(torch.stack([each[0] for each in asked]), [each[1] for each in asked])
                answers = torch.tensor([each[2] for each in asked])

                def answer(own):
                    tokens = models[own].generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
                    correct[own][numbers] = (tokens == answers).float()

                steps = {own: lambda own=own: answer(own) for own in models}
                for own, times in seconds_in_turns(steps, warmup=1, repeats=3, clock="process").items():
                    seconds[own] += sorted(times)[1]
        (unpruned, *_) = models
        kinds = [question[3] for question in questions]
        for own, model in models.items():
            right = {kind: correct[own][[each == kind for each in kinds]].mean().item() for kind in KINDS}
            row = {
                "selection": own.selection,
                "level": own.kept,
                "total_mmacs": total_mmacs(model.config, own),
                **{f"accuracy_{kind}": value for kind, value in right.items()},
                "macs_ratio": total_mmacs(model.config, own) / total_mmacs(model.config, unpruned),
                "time_ratio": seconds[own] / seconds[unpruned],
                "seconds": seconds[own],
                "clock": "process",
                "questions": len(questions),
                "precision": "float32",
                **provenance(seed=seed),
            }
            rows.append(row)
            print(f"{seed} {own.selection:28} {own.kept:3} {100 * sum(right.values()) / 3:5.1f} {row['time_ratio']:.2f}", flush=True)
        Path(output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
