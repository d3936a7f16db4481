"""
Positions under Model Runner V2, which runs on GPUs only: `python run_vllm_pruner.py RESULTS`, in vLLM's environment.

vLLM's own `MultiModalPruner` drives the plugin's model over random requests of up to three images, in chunks, behind
cached prefixes and in both dtypes. Its buffers on the GPU have stand-ins on the CPU. The result has the number of
requests, and those whose positions or whose distance for generated tokens differ from Transformers.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tiny_vlms import BY_NAME, IMAGE, VISION_END, VISION_START
from torch import nn
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from modeling_trips.serving_vllm.qwen import TripsQwen2_5_VLForConditionalGeneration


NUM_ROUNDS = 200
REQUESTS_PER_ROUND = 3
WIDTH = 8
LONGEST = 512


class PositionsOnly(TripsQwen2_5_VLForConditionalGeneration):
    """The plugin's model without weights."""

    def __init__(self):
        nn.Module.__init__(self)
        self.config = SimpleNamespace(image_token_id=IMAGE, video_token_id=93, vision_config=SimpleNamespace())
        self.family = SimpleNamespace(unit=2)


class RopeBuffer:
    """Positions `(3, LONGEST)` of each request, and how far what is generated is ahead."""

    def __init__(self):
        self.positions = torch.zeros(REQUESTS_PER_ROUND, 3, LONGEST, dtype=torch.int32)
        self.deltas = [0] * REQUESTS_PER_ROUND

    def read_prefill_positions(self, request, length):
        return self.positions[request, :, :length]

    def update_prefill_positions(self, request, positions, delta):
        self.positions[request, :, : positions.shape[1]] = positions
        self.deltas[request] = delta


class Request:
    """A random prompt without the dropped visual tokens, and its positions by Transformers."""

    def __init__(self, model, reference, rng, name):
        self.ids = []
        self.features = []
        self.outputs = {}
        whole = []  # with the dropped visual tokens
        places_kept = []
        grids = []
        dtype = rng.choice([torch.float32, torch.bfloat16])

        def add(ids, kept):
            places_kept.extend(len(whole) + place for place in kept)
            whole.extend(ids)
            self.ids += [ids[place] for place in kept]

        def add_text(*ids):
            add(list(ids), list(range(len(ids))))

        for number in range(rng.randint(0, 3)):
            add_text(*rng.choices(range(5, 80), k=rng.randint(1, 5)), VISION_START)
            grid = [1, 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)]
            grids.append(grid)
            size = grid[1] * grid[2] // 4
            kept = sorted(rng.sample(range(size), rng.randint(1, size)))
            place = PlaceholderRange(offset=len(self.ids), length=len(kept))
            add([IMAGE] * size, kept)
            field = MultiModalFieldElem(data=torch.tensor(grid), field=MultiModalBatchedField())
            feature = MultiModalFeatureSpec(
                data=MultiModalKwargsItem({"image_grid_thw": field}),
                modality="image",
                identifier=f"{name}.{number}",
                mm_position=place,
            )
            self.features.append(feature)
            features = torch.randn(len(kept), WIDTH).to(dtype)
            inputs = {"image_grid_thw": torch.tensor([grid])}
            (self.outputs[feature.identifier],) = model.with_places([features], [torch.tensor(kept)], inputs)
        if not grids or rng.random() < 0.7:  # else an image ends the prompt
            add_text(VISION_END, *rng.choices(range(5, 80), k=rng.randint(1, 6)))
        ids = torch.tensor([whole])
        positions, _ = reference.get_rope_index(
            ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=torch.tensor(grids) if grids else None
        )
        self.positions = positions[:, 0, places_kept]
        self.delta = int(self.positions.max()) + 1 - len(self.ids)

    def embeddings_in(self, start, end):
        """Return the visual tokens of each image that are at these places of the prompt."""
        found = []
        for feature in self.features:
            offset = feature.mm_position.offset
            first = max(start - offset, 0)
            last = min(end - offset, feature.mm_position.length)
            if first < last:
                found.append(self.outputs[feature.identifier][first:last])
        return found


def run_round(model, requests, rng):
    """Prefill the requests together, and return those with wrong positions."""
    rope = RopeBuffer()
    ids = torch.zeros(len(requests), LONGEST, dtype=torch.int32)
    names = []
    features = {}
    lengths = np.array([len(request.ids) for request in requests])
    for number, request in enumerate(requests):
        names.append(f"request {number}")
        features[names[number]] = request.features
        ids[number, : lengths[number]] = torch.tensor(request.ids)
        positions, delta = model.get_mrope_input_positions(request.ids, request.features)
        rope.update_prefill_positions(number, positions, delta)
    pruner = MultiModalPruner(model, rope, SimpleNamespace(mm_features=features), WIDTH)
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
    wrong = set()
    done = np.array([rng.choice([0, 0, rng.randrange(length)]) for length in lengths])  # a prefix may be cached
    while (done < lengths).any():
        (active,) = (done < lengths).nonzero()
        ends = done.copy()
        embeddings = []
        for number in active:
            ends[number] = min(done[number] + rng.randint(1, 9), lengths[number])
            embeddings += requests[number].embeddings_in(done[number], ends[number])
        batch = SimpleNamespace(
            req_ids=[names[number] for number in active],
            idx_mapping_np=active,
            prefill_len_np=lengths[active],
            num_computed_prefill_tokens_np=done[active],
            num_scheduled_tokens=(ends - done)[active],
        )
        if embeddings:
            stripped = pruner.recompute(embeddings, batch, states)
            for without_places, with_places in zip(stripped, embeddings):
                assert torch.equal(without_places, with_places[:, :WIDTH])
        for number in active:
            positions = rope.positions[number, :, done[number] : ends[number]]
            expected = requests[number].positions[:, done[number] : ends[number]]
            if not torch.equal(positions.long(), expected):
                wrong.add(int(number))
        done = ends
    for number, request in enumerate(requests):
        if rope.deltas[number] != request.delta:
            wrong.add(number)
    return wrong


if __name__ == "__main__":
    rng = random.Random(0)
    torch.manual_seed(0)
    model = PositionsOnly()
    reference = BY_NAME["qwen2_5_vl"].make().model
    result = {"requests": 0, "at_the_end": 0, "wrong": []}
    for round_number in range(NUM_ROUNDS):
        requests = [Request(model, reference, rng, f"{round_number}.{i}") for i in range(REQUESTS_PER_ROUND)]
        result["requests"] += len(requests)
        result["at_the_end"] += sum(request.ids[-1] == IMAGE for request in requests)
        for number in run_round(model, requests, rng):
            result["wrong"].append(requests[number].ids)
    Path(sys.argv[1]).write_text(json.dumps(result), "utf-8")
