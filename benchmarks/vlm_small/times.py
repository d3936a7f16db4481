r"""
Time tower, prefill and decoding of methods that reduce visual tokens in the small LLaVA, in turns.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/times.py --clock process \
        --output_json docs/results/vlm_scenes_times.json

The model and the guide are random, because times do not depend on the weights.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from busy_scenes import IMAGE_SIZE
from contestants import Contestant, costs, kept_for, llava_inputs, low_resolution_features, prefill, set_contestant
from small_model import EOS, WORDS, make_model

from modeling_trips.hosts import TextGuide, prune_inputs
from modeling_trips.hosts.vlm.wrapper import selection_of


sys.path.append(str(Path(__file__).resolve().parents[1]))
from measuring import TimingArguments, run_benchmark  # noqa: E402


@dataclass(kw_only=True)
class TimesArguments(TimingArguments):
    batch_size: int = field(default=16, metadata={"help": "Questions per batch."})
    prompt_length: int = field(default=6, metadata={"help": "Tokens of a question."})
    layer: int = field(default=2, metadata={"help": "Selection layer of the tower."})


def contestants_of(layer: int) -> list[Contestant]:
    rows = [Contestant("unpruned")]
    for kept in map(kept_for, (9, 16)):
        rows += [
            Contestant("max-min diversity, exit", kept, scorer="diversity"),
            Contestant("prompt and diversity, exit", kept, scorer="prompt"),
            Contestant("pooling, exit", kept, scorer="pooling"),
            Contestant("FastV", kept, fastv=True),
            Contestant("image [CLS], tower", kept, layer=layer, guidance="image"),
            Contestant("TextGuide from regions, tower", kept, layer=layer, guidance="text"),
            Contestant(
                "TextGuide from regions, tower, then prompt, exit",
                kept,
                layer=layer,
                guidance="text",
                tower_kept=round(1.5 * kept),
                scorer="prompt",
            ),
        ]
    return rows + [Contestant("fewer pixels", side * side, side=side) for side in (7, 6, 4, 3)]


class Steps:
    """Steps of a contestant: tower (with connector and selection), prefill and one decoding step."""

    def __init__(self, model, contestant: Contestant, guides: dict, args: TimesArguments):
        self.model, self.contestant, self.guides = model, contestant, guides
        self.pixel_values = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.prompt = torch.randint(4, len(WORDS), (args.batch_size, args.prompt_length))
        self.is_applied = contestant.side is None and not contestant.fastv

    def prepare(self):
        set_contestant(self.model, self.contestant, self.guides)
        with torch.no_grad():
            self.encoded = self.tower()
            self.cache = self.prefill()
        self.length = self.cache.get_seq_length()

    @torch.no_grad()
    def tower(self):
        if self.contestant.side is not None:
            return low_resolution_features(self.model, self.contestant.side, self.pixel_values)
        if self.contestant.fastv:
            return torch.stack([*self.model.model.get_image_features(self.pixel_values).pooler_output])
        inputs = llava_inputs(self.pixel_values, self.prompt)
        if selection_of(self.model) is None:
            return prune_inputs(self.model, inputs, keep_rate=1.0)
        return selection_of(self.model).prune(self.model, inputs)

    @torch.no_grad()
    def prefill(self):
        if self.is_applied:
            inputs = {**self.encoded, "mm_encoder_outputs": dict(self.encoded["mm_encoder_outputs"])}
            return self.model(**inputs, use_cache=True, logits_to_keep=1)["cache"]
        kept = self.contestant.kept if self.contestant.fastv else None
        return prefill(self.model, self.encoded, self.prompt, kept)[1]

    @torch.no_grad()
    def decoding(self):
        token = torch.full((len(self.prompt), 1), EOS)
        position = torch.full_like(token, self.length)
        states = self.model.model.language_model(
            input_ids=token, position_ids=position, cache=self.cache, use_cache=True
        )
        self.model.lm_head(states.last_hidden_state)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]


def measure(args: TimesArguments) -> Iterator[dict]:
    model = make_model(args.seed).eval()
    guides = {"text": TextGuide.for_model(model).eval()}
    contestants = contestants_of(args.layer)
    parts = {}
    for number, contestant in enumerate(contestants):
        steps = Steps(model, contestant, guides, args)
        for part in ("tower", "prefill", "decoding"):
            parts[f"{number} {part}"] = (steps, getattr(steps, part))
    times = args.time_in_turns(
        {name: step for name, (_, step) in parts.items()}, prepare=lambda name: parts[name][0].prepare()
    )
    for number, contestant in enumerate(contestants):
        milliseconds = {
            f"{part}_ms": 1000 * times[f"{number} {part}"]["latency"] for part in ("tower", "prefill", "decoding")
        }
        yield {
            **asdict(contestant),
            **milliseconds,
            **costs(model.config, contestant, args.prompt_length),
            **args.settings(),
        }


def report(rows: list[dict], args: TimesArguments):
    for row in rows:
        print(
            f"{row['name']:50} {row['kept']:4}",
            *(f"{row[f'{part}_ms']:8.1f}" for part in ("tower", "prefill", "decoding")),
        )


if __name__ == "__main__":
    run_benchmark(TimesArguments, __doc__, measure, report)
