# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Weights of other models -> TRIPS, strictly: rules name the source of every weight; what they do not name stops the
conversion. This file holds the mechanism and what several models share.

TRIPS adds no parameter, so a checkpoint of an unpruned model is a checkpoint of the pruned one, at any keep rate.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_trips import TripsConfig


# What models of Transformers name as TRIPS does.
VISION_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "initializer_range",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
    "pad_token_id",
)


class ConversionError(ValueError):
    """Names every key that is missing, too many, or of the wrong shape."""


@dataclass(frozen=True)
class Rule:
    """
    The source of the weights whose whole names match `target`.

    Args:
        target (`str`): regular expression of names in the TRIPS model.
        source (`str` or `Callable`): key in the source, with `\\1` for what the first group matched; or a function of
            the match.
        change (`Callable`, *optional*): turns the source's tensor into the target's.
    """

    target: str
    source: str | Callable[[re.Match], str]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """
    How a source becomes a TRIPS model.

    Args:
        model_class (`str`): name of the class that takes the weights.
        config ([`TripsConfig`]): its configuration, with the sizes of the source.
        rules (`tuple[Rule, ...]`): of several rules that match a target, the first counts.
        left_out (`dict[str, str]`): regular expression of source keys that are not used -> why.
        new (`tuple[str, ...]`): regular expressions of targets without a source, which keep their initial values.
        zero (`tuple[str, ...]`): regular expressions of targets that are set to zero.
        sized_by (`tuple[str, ...]`): the source keys that the sizes were read from, for error messages.
    """

    model_class: str
    config: TripsConfig
    rules: tuple[Rule, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    sized_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What became of every key: `used` and `left_out` (key -> why) are the source's, all others the model's."""

    used: list[str]
    left_out: dict[str, str]
    filled: list[str]
    new: list[str]
    zero: list[str]

    def __str__(self) -> str:
        source, model = [*self.used, *self.left_out], [*self.filled, *self.new, *self.zero]
        lines = [f"used: {len(self.used)} weights of the source"]
        for reason in dict.fromkeys(self.left_out.values()):
            keys = [key for key, why in self.left_out.items() if why == reason]
            lines.append(f"left out, {reason}: {_summary(keys, source)}")
        if self.zero:
            lines.append(f"set to zero: {_summary(self.zero, model)}")
        lines.append(f"new: {_summary(self.new, model)}")
        return "\n".join(lines)


def _summary(keys: list[str], all_keys: Iterable[str], limit: int = 12) -> str:
    """How many, and which, in at most `limit` entries: `branch.*` if `keys` has all of a branch, else whole names."""
    others = {branch for key in set(all_keys).difference(keys) for branch in _branches(key)}
    whole = (next((f"{branch}.*" for branch in _branches(key) if branch not in others), key) for key in keys)
    entries = _join_layers(dict.fromkeys(whole))
    if len(entries) > limit:
        entries[limit - 1 :] = [f"{len(entries) - limit + 1} more"]
    return f"{len(keys)} ({', '.join(entries)})" if entries else "0"


def _branches(key: str) -> list[str]:
    """From the shortest to the longest: `a` and `a.b` of `a.b.c`."""
    return [key[: dot.start()] for dot in re.finditer(r"\.", key)]


def _join_layers(entries: Iterable[str]) -> list[str]:
    """Entries that differ in their first number alone become one: `layer.{0,1}.norm.*`."""
    numbers = defaultdict(list)
    for entry in entries:
        before, number, after = re.match(r"(.*?\.(?=\d+\.)|.*)(\d*)(.*)", entry).groups()
        numbers[before, after].append(number)
    return [
        before + (found[0] if len(found) == 1 else f"{{{','.join(sorted(found, key=int))}}}") + after
        for (before, after), found in numbers.items()
    ]


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def key_map(targets: Iterable[str], rules: Iterable[Rule]) -> dict[str, tuple[str, Callable | None]]:
    """Target -> (source key, change) for every target that a rule names."""
    sources = {}
    for target in targets:
        for rule in rules:
            match = re.fullmatch(rule.target, target)
            if match:
                key = rule.source(match) if callable(rule.source) else match.expand(rule.source)
                sources[target] = key, rule.change
                break
    return sources


def convert_weights(
    source: Mapping[str, torch.Tensor], plan: ConversionPlan, targets: Mapping[str, torch.Size]
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """
    Renames, splits and reshapes the weights of another model into those of a TRIPS model.

    Args:
        source (`dict[str, torch.Tensor]`): state dict of the other model.
        plan ([`ConversionPlan`]): the rules.
        targets (`dict[str, torch.Size]`): the weights that the TRIPS model has, and their shapes.

    Returns:
        The weights by target (without those that are new) and a [`ConversionReport`].

    Raises:
        ConversionError: unless every source key is used or left out by name, every target is filled or new by name,
            and all shapes fit. It lists all keys that do not.
    """
    sources = key_map(targets, plan.rules)
    used = {key for key, _ in sources.values()}
    unused = sorted(source.keys() - used)
    left_out = {
        key: next((why for pattern, why in plan.left_out.items() if re.fullmatch(pattern, key)), None)
        for key in unused
    }
    zero = [name for name in targets if name not in sources and _matches(plan.zero, name)]
    new = [name for name in targets if name not in sources and name not in zero and _matches(plan.new, name)]
    weights = {name: torch.zeros(targets[name]) for name in zero}
    misshapen = []
    for target, (key, change) in sources.items():
        if key in source:
            try:
                weights[target] = _changed(source[key], change, targets[target])
            except ValueError as error:
                misshapen.append(f"{key} {tuple(source[key].shape)}: {target} {error}")
    _raise_problems(
        {
            "missing from the source": sorted(used - source.keys()),
            "in the source, but neither used nor left out by name": [key for key in unused if left_out[key] is None],
            "in the model, but neither filled nor new": sorted(targets.keys() - sources.keys() - {*zero, *new}),
            "of another shape": misshapen,
        },
        plan.sized_by,
        source,
    )
    return weights, ConversionReport(sorted(used), left_out, list(sources), new, zero)


def _changed(tensor: torch.Tensor, change: Callable | None, shape: torch.Size) -> torch.Tensor:
    try:
        changed = tensor if change is None else change(tensor)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"cannot be made from it: {error}") from error
    if changed.shape != shape:
        raise ValueError(f"takes {tuple(shape)}, got {tuple(changed.shape)}")
    return changed


def _raise_problems(problems: dict[str, list[str]], sized_by: Iterable[str], source: Mapping[str, torch.Tensor]):
    lines = [f"{what} ({len(keys)}):\n    " + "\n    ".join(keys) for what, keys in problems.items() if keys]
    if not lines:
        return
    sizes = ", ".join(f"{key} {tuple(source[key].shape)}" for key in sized_by if key in source)
    hint = f"\nThe model's sizes were read from {sizes}." if sizes and problems["of another shape"] else ""
    raise ConversionError("The weights do not fit the model. Keys\n" + "\n".join(lines) + hint)


def load_converted(model: nn.Module, source: Mapping[str, torch.Tensor], plan: ConversionPlan) -> ConversionReport:
    """
    Fills `model`, made from `plan.config`, in place; raises as `convert_weights`. What is tied to a weight that is
    filled is not new.
    """
    state = model.state_dict()
    weights, report = convert_weights(source, plan, {name: value.shape for name, value in state.items()})
    model.load_state_dict(weights, strict=False)  # not strict: the new weights keep their initial values
    places = {state[name].data_ptr() for name in weights}
    tied = [name for name in report.new if state[name].data_ptr() in places]
    new = [name for name in report.new if name not in tied]
    return replace(report, filled=report.filled + tied, new=new)


def third(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Query (0), key (1) or value (2) of weights that are stacked in this order."""
    return lambda stacked: stacked.chunk(3)[index]


def resampled(grid: tuple[int, int], new_grid: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Positions `(1, 1 + rows * columns, hidden_size)` of one patch grid -> another, bicubic; [CLS] stays."""

    def change(positions: torch.Tensor) -> torch.Tensor:
        if grid == new_grid:
            return positions
        patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()
        patches = nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
        return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)

    return change


def fields_of(config: PreTrainedConfig, names: Iterable[str]) -> dict:
    """Those of the fields `names` that another model's configuration has."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def size_of(source: Mapping[str, torch.Tensor], key: str, num_dimensions: int) -> tuple[int, ...]:
    """Shape of a weight that a model's sizes are read from."""
    if key not in source:
        raise ConversionError(f"{key} is missing from the source: the model's sizes are read from it.")
    if source[key].ndim != num_dimensions:
        raise ConversionError(f"{key} must have {num_dimensions} dimensions, got shape {tuple(source[key].shape)}.")
    return tuple(source[key].shape)


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """Number of layers whose keys begin with `prefix` and a number."""
    numbers = [int(match[1]) for match in (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in keys) if match]
    if not numbers:
        raise ConversionError(f"{prefix}* is missing from the source: it has no such layers.")
    return 1 + max(numbers)


def bert_layers(target: str, source: str, first_layer: int = 0) -> Rule:
    """Layer i of the TRIPS part `target` is layer `first_layer + i` of the BERT `source`; both name parts alike."""
    return Rule(
        rf"{target}\.encoder\.layer\.(\d+)\.(.*)",
        lambda match: f"{source}.encoder.layer.{first_layer + int(match[1])}.{match[2]}",
    )


def lm_head_rules(
    head: str, predictions: str, embeddings: str, source: Mapping[str, torch.Tensor]
) -> tuple[tuple[Rule, ...], dict[str, str], bool]:
    """
    From BERT's prediction head to a `TripsLMHead`.

    Args:
        head, predictions (`str`): their names in the TRIPS model and in the source.
        embeddings (`str`): key of the word embeddings, which the head's output weights are tied to unless the source
            has others.

    Returns:
        The rules, the source keys to leave out, and whether the weights are tied.
    """
    weight, bias, bias_again = (f"{predictions}.{name}" for name in ("decoder.weight", "decoder.bias", "bias"))
    tied = weight not in source or (embeddings in source and torch.equal(source[weight], source[embeddings]))
    left_out = {re.escape(weight): "equal to the word embeddings, which it is tied to"} if tied else {}
    if bias in source and bias_again in source:
        # Both name one parameter, and BERT's own loading fills it from the former last.
        same = torch.equal(source[bias], source[bias_again])
        left_out[re.escape(bias_again)] = f"{'equal to' if same else 'overwritten by'} the bias that is used"
    rules = (
        Rule(rf"{head}\.(dense|LayerNorm)\.(.*)", rf"{predictions}.transform.\1.\2"),
        Rule(rf"{head}\.decoder\.weight", embeddings if tied else weight),
        Rule(rf"{head}\.decoder\.bias", bias if bias in source else bias_again),
    )
    return rules, left_out, tied
