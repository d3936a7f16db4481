"""
Measure TRIPS and its alternatives in one run: models of Transformers for question answering or matching, and token
reduction in a ViT.

    python benchmarks/peers.py                                        # base size, 384 px, all tasks
    python benchmarks/peers.py --task answer --texts_per_image 1 10 --output_json peers.json
    python benchmarks/peers.py --task tower --image_size 224 --batch_size 8

All models have the sizes of their published base models, random weights, and the same images, texts, batch, dtype and
threads. Steps alternate after a warm-up, and medians are compared. Tasks:

    answer  Encode image and question, and generate 2 tokens. ViLT has no decoder and classifies 3129 answers.
            "shared": the image is encoded once for all its questions.
    match   Score each pair of a text and an image.
    tower   Encode images with a ViT-B/16, unpruned and with as many tokens per layer as in --tower_schedule.

Published ViLT weights have patches of 32 pixels only. vilt-16 has patches of 16 pixels, like all other models.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch
from measuring import TimingArguments, check_choices, make_transformers_model, run_benchmark
from torch import nn
from tqdm.auto import tqdm

from modeling_trips import (
    UNPRUNED,
    SelectionSchedule,
    TripsConfig,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsPreTrainedModel,
    TripsVisionModel,
)
from modeling_trips.hosts import apply_patch_selection
from modeling_trips.patch_selection import num_kept_tokens


PATCH_SIZE = 16
MAX_TEXT_LENGTH = 40  # of ViLT
NUM_ANSWERS = 3129  # classes of ViLT and others in VQAv2
ANSWER_LENGTH = {"min_new_tokens": 2, "max_new_tokens": 2}


@dataclass(kw_only=True)
class PeerArguments(TimingArguments):
    task: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "answer, match or tower."})
    peers: list[str] | None = field(default=None, metadata={"help": "Other models to measure. Default: all."})
    schedule: list[str] = field(
        default_factory=lambda: ["5,10", "3:image,6:image,9:image,12:text:0.3", "5:image,10:image"],
        metadata={"help": "Schedules of TRIPS. Default keep rate of a layer: 0.7."},
    )
    preset: str = field(default="base", metadata={"help": "Size of TRIPS. The other models have base size."})
    tower_schedule: str = field(default="5:image,10:image", metadata={"help": "Schedule of the task tower."})
    image_size: int = field(default=384, metadata={"help": "Pixels per side."})
    batch_size: int = field(default=1, metadata={"help": "Images per step."})
    texts_per_image: list[int] = field(default_factory=lambda: [1, 10], metadata={"help": "Texts per image."})
    text_length: int = field(default=40, metadata={"help": "Tokens per text, at most 40 (ViLT's limit)."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})

    def __post_init__(self):
        super().__post_init__()
        check_choices("--task", self.task, TASKS)
        check_choices("--peers", self.peers or (), [name for task in self.task for name in TASKS[task].peers])
        if self.text_length > MAX_TEXT_LENGTH:
            raise ValueError(f"--text_length must be at most {MAX_TEXT_LENGTH}, got {self.text_length}.")

    def schedules(self, task: str) -> dict[str, SelectionSchedule]:
        """Return the schedules of TRIPS in a task, with the unpruned one, by the names of their rows."""
        schedules = [
            SelectionSchedule.parse(text)
            for text in (self.schedule if TASKS[task].has_texts else [self.tower_schedule])
        ]
        return {f"TRIPS, {schedule}": schedule for schedule in schedules} | {"TRIPS, unpruned": UNPRUNED}


@dataclass
class Peer:
    """Alternative model: constructor, step, and packages it needs besides Transformers."""

    make: Callable[[PeerArguments], nn.Module]
    work: Callable[[nn.Module, "Inputs"], object]
    packages: tuple[str, ...] = ()


@dataclass
class Inputs:
    """Texts, images, and the index of each text's image."""

    input_ids: torch.LongTensor
    pixel_values: torch.Tensor
    image_index: torch.LongTensor

    @property
    def pairs(self) -> dict[str, torch.Tensor]:
        """Return inputs for models without `image_index`, with images repeated per text."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "pixel_values": self.pixel_values[self.image_index],
        }

    @property
    def shared(self) -> dict[str, torch.Tensor]:
        return {**self.pairs, "pixel_values": self.pixel_values, "image_index": self.image_index}


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def of_transformers(name: str, **fields) -> Callable[[PeerArguments], nn.Module]:
    return lambda args: make_transformers_model(name, args.image_size, **fields)


def generate_answers(model: nn.Module, inputs: Inputs) -> torch.LongTensor:
    return model.generate(**inputs.pairs, **ANSWER_LENGTH)


def generate_answers_shared(model: nn.Module, inputs: Inputs) -> torch.LongTensor:
    """Run BLIP's `generate` with the image encoded once for all its questions."""
    questions, text_config = fuse_shared(model, inputs), model.config.text_config
    return model.text_decoder.generate(
        input_ids=torch.full_like(inputs.input_ids[:, :1], model.decoder_start_token_id),
        eos_token_id=text_config.sep_token_id,
        pad_token_id=text_config.pad_token_id,
        encoder_hidden_states=questions,
        encoder_attention_mask=torch.ones_like(inputs.input_ids),
        **ANSWER_LENGTH,
    )


def fuse_shared(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return BLIP's fused states of each text, with the image encoded once for all its texts."""
    images = model.vision_model(pixel_values=inputs.pixel_values)[0][inputs.image_index]
    return model.text_encoder(
        input_ids=inputs.input_ids,
        attention_mask=torch.ones_like(inputs.input_ids),
        encoder_hidden_states=images,
        encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long, device=images.device),
    )[0]


def forward_pairs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model(**inputs.pairs)[0]


def match_shared(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Run BLIP's `forward` with the image encoded once for all its texts."""
    return model.itm_head(fuse_shared(model, inputs)[:, 0])


def encode_images(model: nn.Module, inputs: Inputs):
    model(inputs.pixel_values)


def make_vit(args: PeerArguments) -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", img_size=args.image_size, num_classes=0)


class MergeTokens(nn.Module):
    """Merge similar patches with the matching of tomesd, down to a number. [CLS] is kept."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        from tomesd.merge import bipartite_soft_matching_random2d

        class_token, patches = tokens[:, :1], tokens[:, 1:]
        num_patches = patches.shape[1]
        merge, _ = bipartite_soft_matching_random2d(
            patches, w=num_patches, h=1, sx=2, sy=1, r=num_patches - self.num_tokens, no_rand=True
        )
        return torch.cat((class_token, merge(patches)), dim=1)


class DropTokens(nn.Module):
    """Keep random patches with timm's patch dropout in training mode. [CLS] is kept."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        from timm.layers.patch_dropout import patch_dropout_forward

        share = 1 - (self.num_tokens + 0.5) / (tokens.shape[1] - 1)  # the number of kept tokens is rounded down
        return patch_dropout_forward(tokens, share, num_prefix_tokens=1, ordered=False, training=True)[0]


def make_shortened_vit(args: PeerArguments, shorten: Callable[[int], nn.Module]) -> nn.Module:
    """Make a ViT with modules between its layers that leave as many tokens as the schedule of TRIPS."""
    vit, blocks, num_tokens = make_vit(args), [], (args.image_size // PATCH_SIZE) ** 2
    schedule = SelectionSchedule.parse(args.tower_schedule)
    rates = {layer: selection.keep_rate for layer, selection in schedule.by_layer.items()}
    for number, block in enumerate(vit.blocks, start=1):
        blocks.append(block)
        if number in rates:
            num_tokens = num_kept_tokens(num_tokens, rates[number]) + 1  # with the fused token
            blocks.append(shorten(num_tokens))
    vit.blocks = nn.Sequential(*blocks)
    return vit


def make_selecting_vit(args: PeerArguments) -> nn.Module:
    vit, schedule = make_vit(args), SelectionSchedule.parse(args.tower_schedule)
    apply_patch_selection(vit, schedule)
    return vit


# ---------------------------------------------------------------------------------------------------------------------
# TRIPS


def make_trips(model_class: type[TripsPreTrainedModel], schedule: SelectionSchedule, args: PeerArguments) -> nn.Module:
    config = TripsConfig.from_preset(
        args.preset, vision_config={"image_size": args.image_size}, **schedule.config_fields
    )
    return model_class(config.vision_config if model_class is TripsVisionModel else config)


def generate_trips_answers(model: TripsForQuestionAnswering, inputs: Inputs):
    model.generate(**inputs.shared, **ANSWER_LENGTH)


def match_trips(model: TripsForRetrieval, inputs: Inputs):
    model.match(**inputs.shared)


@dataclass
class Task:
    """Task with TRIPS's head, its step and its alternatives. The first alternative is the reference."""

    model_class: type[TripsPreTrainedModel]
    work: Callable[[TripsPreTrainedModel, Inputs], object]
    peers: dict[str, Peer]
    has_texts: bool = True


TASKS = {
    "answer": Task(
        TripsForQuestionAnswering,
        generate_trips_answers,
        {
            "blip": Peer(of_transformers("BlipForQuestionAnswering"), generate_answers),
            "blip-shared": Peer(of_transformers("BlipForQuestionAnswering"), generate_answers_shared),
            "vilt-32": Peer(
                of_transformers("ViltForQuestionAnswering", num_labels=NUM_ANSWERS, patch_size=32), forward_pairs
            ),
            "vilt-16": Peer(of_transformers("ViltForQuestionAnswering", num_labels=NUM_ANSWERS), forward_pairs),
        },
    ),
    "match": Task(
        TripsForRetrieval,
        match_trips,
        {
            "blip-match": Peer(of_transformers("BlipForImageTextRetrieval"), forward_pairs),
            "blip-match-shared": Peer(of_transformers("BlipForImageTextRetrieval"), match_shared),
            "vilt-32-match": Peer(of_transformers("ViltForImageAndTextRetrieval", patch_size=32), forward_pairs),
            "vilt-16-match": Peer(of_transformers("ViltForImageAndTextRetrieval"), forward_pairs),
            "bridgetower-match": Peer(of_transformers("BridgeTowerForImageAndTextRetrieval"), forward_pairs),
        },
    ),
    "tower": Task(
        TripsVisionModel,
        encode_images,
        {
            "timm-vit": Peer(make_vit, encode_images, ("timm",)),
            "timm-vit, patch dropout": Peer(partial(make_shortened_vit, shorten=DropTokens), encode_images, ("timm",)),
            "timm-vit, merging": Peer(
                partial(make_shortened_vit, shorten=MergeTokens), encode_images, ("timm", "tomesd")
            ),
            "timm-vit, TRIPS inside": Peer(make_selecting_vit, encode_images, ("timm",)),
        },
        has_texts=False,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def make_inputs(args: PeerArguments, texts_per_image: int) -> Inputs:
    torch.manual_seed(0)
    dtype, size = getattr(torch, args.dtype), args.image_size
    image_index = torch.arange(args.batch_size, device=args.device).repeat_interleave(texts_per_image)
    shape = (len(image_index), args.text_length)
    return Inputs(
        torch.randint(1, 100, shape, device=args.device),
        torch.randn(args.batch_size, 3, size, size, device=args.device, dtype=dtype),
        image_index,
    )


def is_installed(name: str, packages: tuple[str, ...]) -> bool:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        print(f"Skipped {name}. Run `pip install {' '.join(missing)}` to measure it.")
    return not missing


def make_models(task: str, args: PeerArguments) -> dict[str, tuple[nn.Module, Callable]]:
    """Return the models of a task with their steps by the names of their rows. Variants of TRIPS share weights."""
    makers = {
        name: (partial(peer.make, args), peer.work)
        for name, peer in TASKS[task].peers.items()
        if (args.peers is None or name in args.peers) and is_installed(name, peer.packages)
    }
    for name, schedule in args.schedules(task).items():
        makers[name] = (partial(make_trips, TASKS[task].model_class, schedule, args), TASKS[task].work)
    models, ours = {}, None
    for name, (make, work) in tqdm(makers.items(), desc=f"models of {task}", leave=False):
        torch.manual_seed(0)
        model = make().to(args.device, getattr(torch, args.dtype)).eval()
        if isinstance(model, TripsPreTrainedModel):
            ours = ours or model
            model.load_state_dict(ours.state_dict(), assign=True)
        models[name] = (model, work)
    return models


def fits(name: str, step: Callable[[], object]) -> bool:
    """Return whether a first step fits in memory, and print a line if not."""
    try:
        step()
    except torch.OutOfMemoryError:
        print(f"Skipped {name}, which does not fit in memory with these images and texts.")
        return False
    return True


@torch.no_grad()
def measure(task: str, models: dict[str, tuple[nn.Module, Callable]], texts_per_image: int, args) -> list[dict]:
    """Return a row for each model that fits into memory."""
    inputs = make_inputs(args, texts_per_image)
    steps = {name: partial(work, model, inputs) for name, (model, work) in models.items()}
    steps = {name: step for name, step in steps.items() if fits(name, step)}
    if not steps:
        return []
    return [
        {
            **args.settings("peers", "schedule"),
            "task": task,
            "texts_per_image": texts_per_image,
            "model": name,
            "num_parameters": sum(parameter.numel() for parameter in models[name][0].parameters()),
            "throughput": len(inputs.input_ids) / times["latency"],
            "compared_with": next(iter(steps)),
            **times,
        }
        for name, times in args.time_in_turns(steps).items()
    ]


def print_table(rows: list[dict], args: PeerArguments):
    width = max(len(row["model"]) for row in rows)
    for (task, texts), group in itertools.groupby(rows, key=lambda row: (row["task"], row["texts_per_image"])):
        work = task if task == "tower" else f"{task}, {texts} text(s) per image"
        group = list(group)
        print(f"\n{work:<{width}}  parameters        ms  per second  speed-up over {group[0]['compared_with']}")
        for row in group:
            print(
                f"{row['model']:<{width}}  {row['num_parameters'] / 1e6:9.0f}M  {1000 * row['latency']:8.1f}  "
                f"{row['throughput']:10.2f}  {row['speedup']:8.2f}"
            )


def measure_all(args: PeerArguments) -> Iterator[dict]:
    for task in args.task:
        models = make_models(task, args)
        for texts_per_image in args.texts_per_image if TASKS[task].has_texts else [1]:
            yield from measure(task, models, texts_per_image, args)


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(PeerArguments, __doc__, measure_all, print_table, argv)


if __name__ == "__main__":
    main()
