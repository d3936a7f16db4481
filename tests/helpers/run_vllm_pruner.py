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

from modeling_trips.hosts.vlm.visual_tokens import VisualTokens
from modeling_trips.serving_vllm.qwen import TripsQwen2_5_VLForConditionalGeneration


NUM_ROUNDS, REQUESTS_PER_ROUND, WIDTH, LONGEST = 200, 3, 8, 512


class PositionsOnly(TripsQwen2_5_VLForConditionalGeneration):
    """The plugin's model without weights."""

    def __init__(self):
        nn.Module.__init__(self)
        self.family = SimpleNamespace(image_token_id=IMAGE, unit=2)


class RopeBuffer:
    """Positions `(3, LONGEST)` of each request, and how far what is generated is ahead."""

    def __init__(self):
        self.positions = torch.zeros(REQUESTS_PER_ROUND, 3, LONGEST, dtype=torch.int32)
        self.deltas = [0] * REQUESTS_PER_ROUND

    def read_prefill_positions(self, request: int, length: int) -> torch.Tensor:
        return self.positions[request, :, :length]

    def update_prefill_positions(self, request: int, positions: torch.Tensor, delta: int):
        self.positions[request, :, : positions.shape[1]] = positions
        self.deltas[request] = delta


class Request:
    """A random prompt without the dropped visual tokens, and its positions by Transformers."""

    def __init__(self, model: PositionsOnly, reference: nn.Module, rng: random.Random, name: str):
        whole, is_kept, grids = [], [], []
        self.ids, self.features, self.outputs = [], [], {}
        dtype = rng.choice([torch.float32, torch.bfloat16])

        def add_text(ids: list[int]):
            whole.extend(ids)
            is_kept.extend([True] * len(ids))
            self.ids += ids

        for number in range(rng.randint(0, 3)):
            add_text([*rng.choices(range(5, 80), k=rng.randint(1, 5)), VISION_START])
            grid = [1, 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)]
            size = grid[1] * grid[2] // 4
            kept = sorted(rng.sample(range(size), rng.randint(1, size)))
            whole += [IMAGE] * size
            is_kept += [place in kept for place in range(size)]
            grids.append(grid)
            place = PlaceholderRange(offset=len(self.ids), length=len(kept))
            self.ids += [IMAGE] * len(kept)
            field = MultiModalFieldElem(data=torch.tensor(grid), field=MultiModalBatchedField())
            feature = MultiModalFeatureSpec(
                data=MultiModalKwargsItem({"image_grid_thw": field}),
                modality="image",
                identifier=f"{name}.{number}",
                mm_position=place,
            )
            self.features.append(feature)
            tokens = VisualTokens.whole([torch.randn(size, WIDTH).to(dtype)]).keep([torch.tensor(kept)])
            self.outputs[feature.identifier] = model.with_places(tokens, torch.tensor([grid]))[0]
        if not grids or rng.random() < 0.7:  # else an image ends the prompt
            add_text([VISION_END, *rng.choices(range(5, 80), k=rng.randint(1, 6))])
        ids = torch.tensor([whole])
        positions, _ = reference.get_rope_index(
            ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=torch.tensor(grids) if grids else None
        )
        self.positions = positions[:, 0, torch.tensor(is_kept)]
        self.delta = int(self.positions.max()) + 1 - len(self.ids)


def run_round(model: PositionsOnly, requests: list[Request], rng: random.Random) -> set[int]:
    """Prefill the requests together, and return those with wrong positions."""
    rope, wrong = RopeBuffer(), set()
    ids = torch.zeros(len(requests), LONGEST, dtype=torch.int32)
    for number, request in enumerate(requests):
        positions, delta = model.get_mrope_input_positions(request.ids, request.features)
        rope.update_prefill_positions(number, positions, delta)
        ids[number, : len(request.ids)] = torch.tensor(request.ids)
    names = [f"request {number}" for number in range(len(requests))]
    cache = SimpleNamespace(mm_features={name: request.features for name, request in zip(names, requests)})
    pruner = MultiModalPruner(model, rope, cache, WIDTH)
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
    done = [rng.choice([0, 0, rng.randint(0, len(request.ids) - 1)]) for request in requests]  # a prefix may be cached
    while active := [number for number, request in enumerate(requests) if done[number] < len(request.ids)]:
        ends = [min(done[number] + rng.randint(1, 9), len(requests[number].ids)) for number in active]
        embeddings = []
        for number, end in zip(active, ends):
            for feature in requests[number].features:
                offset, length = feature.mm_position.offset, feature.mm_position.length
                first, last = max(done[number] - offset, 0), min(end - offset, length)
                if first < last:
                    embeddings.append(requests[number].outputs[feature.identifier][first:last])
        batch = SimpleNamespace(
            req_ids=[names[number] for number in active],
            idx_mapping_np=np.array(active),
            prefill_len_np=np.array([len(requests[number].ids) for number in active]),
            num_computed_prefill_tokens_np=np.array([done[number] for number in active]),
            num_scheduled_tokens=np.array([end - done[number] for number, end in zip(active, ends)]),
        )
        if embeddings:
            stripped = pruner.recompute(embeddings, batch, states)
            assert all(torch.equal(own, part[:, :WIDTH]) for own, part in zip(stripped, embeddings))
        for number, end in zip(active, ends):
            computed = rope.positions[number, :, done[number] : end]
            if not torch.equal(computed.long(), requests[number].positions[:, done[number] : end]):
                wrong.add(number)
            done[number] = end
    return wrong | {number for number, request in enumerate(requests) if rope.deltas[number] != request.delta}


if __name__ == "__main__":
    rng = random.Random(0)
    torch.manual_seed(0)
    model, reference = PositionsOnly(), BY_NAME["qwen2_5_vl"].make().model
    result = {"requests": 0, "at_the_end": 0, "wrong": []}
    for number in range(NUM_ROUNDS):
        requests = [Request(model, reference, rng, f"{number}.{own}") for own in range(REQUESTS_PER_ROUND)]
        result["requests"] += len(requests)
        result["at_the_end"] += sum(request.ids[-1] == IMAGE for request in requests)
        result["wrong"] += [requests[own].ids for own in run_round(model, requests, rng)]
    Path(sys.argv[1]).write_text(json.dumps(result), "utf-8")
