"""
Rules that convert weights of other models to TRIPS. A rule names the source of each weight, and unnamed weights raise
an error.

TRIPS adds no parameter, so a checkpoint of an unpruned model serves the pruned model at any keep rate.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_trips import OWN_TEXT_FIELDS, TripsConfig, TripsLayersConfig, TripsTextConfig, TripsVisionConfig
from ..modeling_trips_vision import TripsPreTrainedModel


# Fields that models of Transformers may have under the same names.
VISION_FIELDS = TripsVisionConfig.__annotations__.keys()
TEXT_FIELDS = (TripsLayersConfig.__annotations__ | TripsTextConfig.__annotations__).keys() - OWN_TEXT_FIELDS
# Beyond float16's range, which only weights of damaged files exceed.
LARGEST_VALUE = torch.finfo(torch.float16).max


class ConversionError(ValueError):
    """Error that names all keys that are missing, unexpected, of the wrong shape, or have impossible values."""


@dataclass(frozen=True)
class Rule:
    """
    Source of the weights whose whole names match `target`.

    Args:
        target (`str`): Regular expression of names in the TRIPS model.
        source (`str` or `Callable`): Key in the source, with `\\1` for the first group; or a function of the match.
        change (`Callable`, *optional*): Function from the source's tensor to the target's.
    """

    target: str
    source: str | Callable[[re.Match], str]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """
    Plan of a conversion.

    Args:
        model_class (`type`): TRIPS class.
        config ([`TripsConfig`]): Configuration with the sizes of the source.
        rules (`tuple[Rule, ...]`): Rules, of which the first match applies.
        left_out (`dict[str, str]`): Regular expressions of unused source keys, and the reasons.
        new (`tuple[str, ...]`): Regular expressions of targets without a source, which keep their initial values.
        zero (`tuple[str, ...]`): Regular expressions of targets that are set to zero.
    """

    model_class: type[TripsPreTrainedModel]
    config: TripsConfig
    rules: tuple[Rule, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion: source keys `used` and `left_out` (key -> reason), and keys of the model."""

    used: list[str]
    left_out: dict[str, str]
    filled: list[str]
    new: list[str]
    zero: list[str]

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for key, reason in self.left_out.items():
            groups.setdefault(f"left out, {reason}", []).append(key)
        groups |= {"set to zero": self.zero, "new": self.new}
        lines = [f"used: {len(self.used)} weights of the source"]
        lines += [f"{what}: {len(keys)} ({', '.join(keys)})" for what, keys in groups.items() if keys]
        return "\n".join(map(printable, lines))


def printable(name: str) -> str:
    """Escape control characters in a name from a file."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _source_of(target: str, rules: Iterable[Rule]) -> tuple[str, Callable | None] | None:
    """Return the source key and the change of the first rule that matches."""
    for rule in rules:
        if match := re.fullmatch(rule.target, target):
            source = rule.source(match) if callable(rule.source) else match.expand(rule.source)
            return source, rule.change
    return None


def _reason_of(key: str, left_out: Mapping[str, str]) -> str | None:
    """Return the reason of the first pattern of `ConversionPlan.left_out` that matches, or None."""
    for pattern, reason in left_out.items():
        if re.fullmatch(pattern, key):
            return reason
    return None


def convert_weights(
    source: Mapping[str, torch.Tensor], plan: ConversionPlan, targets: Mapping[str, torch.Size]
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """
    Rename, split and reshape the weights of another model into those of a TRIPS model.

    Args:
        source (`dict[str, torch.Tensor]`): State dict of the other model.
        plan ([`ConversionPlan`]): Plan of the conversion.
        targets (`dict[str, torch.Size]`): Names and shapes of the TRIPS model's weights.

    Returns:
        The weights by target (without new ones) and a [`ConversionReport`].

    Raises:
        ConversionError: A source key is neither used nor left out, a target is neither filled nor new, a shape does
            not fit, or values are not floating point, not finite or beyond float16. The message lists all keys.
    """
    sources = {target: found for target in targets if (found := _source_of(target, plan.rules))}
    used = {key for key, _ in sources.values()}
    unused = sorted(source.keys() - used)
    left_out = {key: _reason_of(key, plan.left_out) for key in unused}
    without_source = [name for name in targets if name not in sources]
    zero = [name for name in without_source if _matches(plan.zero, name)]
    new = [name for name in without_source if name not in zero and _matches(plan.new, name)]
    weights = {name: torch.zeros(targets[name]) for name in zero}
    misshapen = []
    for target, (key, change) in sources.items():
        if key in source:
            try:
                weights[target] = _changed(source[key], change, targets[target])
            except ValueError as error:
                misshapen.append(f"{key} {tuple(source[key].shape)}: {target} {error}")
    damaged = []
    for key in sorted(used & source.keys()):
        fault = _fault_of_values(source[key])
        if fault is not None:
            damaged.append(f"{key}: {fault}")
    problems = {
        "missing from the source": sorted(used - source.keys()),
        "in the source, but neither used nor left out by name": [key for key in unused if left_out[key] is None],
        "in the model, but neither filled nor new": sorted(set(without_source) - {*zero, *new}),
        "of another shape": misshapen,
        "with impossible values (the file may be damaged)": damaged,
    }
    lines = []
    for what, keys in problems.items():
        if keys:
            names = "\n    ".join(printable(key) for key in keys)
            lines.append(f"{what} ({len(keys)}):\n    {names}")
    if lines:
        raise ConversionError("\n".join(["The weights do not fit the model. Keys", *lines]))
    report = ConversionReport(used=sorted(used), left_out=left_out, filled=list(sources), new=new, zero=zero)
    return weights, report


def _changed(tensor: torch.Tensor, change: Callable | None, shape: torch.Size) -> torch.Tensor:
    try:
        changed = tensor if change is None else change(tensor)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"cannot be made from it: {error}") from error
    if changed.shape != shape:
        raise ValueError(f"takes {tuple(shape)}, got {tuple(changed.shape)}")
    return changed


def _fault_of_values(weight: torch.Tensor) -> str | None:
    """Return what is wrong with the values of a weight (integers, not finite, too large), or None."""
    if not weight.is_floating_point():
        return f"{weight.dtype} instead of floating point"
    if weight.numel() == 0:
        return "empty"
    lowest, highest = weight.float().aminmax()  # both are NaN if any value is NaN
    largest = max(-lowest.item(), highest.item())
    if lowest.isnan():
        return "NaN"
    return f"{largest:g}" if largest > LARGEST_VALUE else None


def load_converted(model: nn.Module, source: Mapping[str, torch.Tensor], plan: ConversionPlan) -> ConversionReport:
    """
    Fill `model`, made from `plan.config`, in place. Weights tied to a filled weight are not new. Raises as
    `convert_weights`.
    """
    state = model.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    weights, report = convert_weights(source, plan, shapes)
    model.load_state_dict(weights, strict=False)  # new weights keep their initial values
    addresses = {state[name].data_ptr() for name in weights}
    tied = []
    new = []
    for name in report.new:
        is_tied = state[name].data_ptr() in addresses
        (tied if is_tied else new).append(name)
    return replace(report, filled=report.filled + tied, new=new)


def make_converted(source: Mapping[str, torch.Tensor], plan: ConversionPlan) -> tuple[nn.Module, ConversionReport]:
    """
    Make a model from `plan.config` and fill it as `load_converted` does, after checking that all weights fit: a small
    file from a stranger can ask for a model that is larger than the memory.
    """
    with torch.device("meta"):
        state = plan.model_class(plan.config).state_dict()
    convert_weights(source, plan, {name: value.shape for name, value in state.items()})
    model = plan.model_class(plan.config)
    return model, load_converted(model, source, plan)


def third(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that takes query (0), key (1) or value (2) from stacked weights."""
    return lambda stacked: stacked.chunk(3)[index]


def stacked_attention(layer: str, source: str) -> tuple[Rule, ...]:
    """Return the rules that map the stacked weights `source` to the attention of a vision layer."""
    return tuple(
        Rule(layer + rf"attention\.{name}_proj\.(.*)", source + r".\2", third(index))
        for index, name in enumerate("qkv")
    )


def resampled(grid: tuple[int, int], new_grid: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that interpolates positions `(1, 1 + rows * columns, hidden_size)` to a new grid, bicubic."""

    def change(positions: torch.Tensor) -> torch.Tensor:
        if grid == new_grid:
            return positions
        of_cls = positions[:, :1]
        of_patches = positions[:, 1:].unflatten(1, grid)  # (1, rows, columns, hidden_size)
        of_patches = nn.functional.interpolate(
            of_patches.permute(0, 3, 1, 2).float(),
            size=new_grid,
            mode="bicubic",
            align_corners=False,
        )  # (1, hidden_size, new_rows, new_columns)
        of_patches = of_patches.flatten(2).transpose(1, 2)  # (1, new_rows * new_columns, hidden_size)
        of_patches = of_patches.to(positions.dtype)
        return torch.cat((of_cls, of_patches), dim=1)

    return change


def fields_of(config: PreTrainedConfig, names: Iterable[str]) -> dict:
    """Return the fields `names` that a configuration has."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def make_config(**fields) -> TripsConfig:
    """Make a [`TripsConfig`]; invalid fields raise a [`ConversionError`]."""
    try:
        return TripsConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        raise ConversionError(f"TRIPS does not support these sizes and options: {error}") from error


def size_of(source: Mapping[str, torch.Tensor], key: str, num_dimensions: int) -> tuple[int, ...]:
    """Return the shape of a weight that a model's sizes are read from."""
    if key not in source:
        raise ConversionError(f"{key} is missing from the source, but the model's sizes are read from it.")
    if source[key].ndim != num_dimensions or source[key].numel() == 0:
        raise ConversionError(f"{key} must have {num_dimensions} dimensions, got shape {tuple(source[key].shape)}.")
    return tuple(source[key].shape)


def bert_layers(target: str, source: str, first_layer: int = 0) -> Rule:
    """Return the rule that maps layer `first_layer + i` of the BERT `source` to layer i of the TRIPS part `target`."""
    return Rule(
        rf"{target}\.encoder\.layer\.(\d+)\.(.*)",
        lambda match: f"{source}.encoder.layer.{first_layer + int(match[1])}.{match[2]}",
    )


def lm_head_rules(
    head: str, predictions: str, embeddings: str, source: Mapping[str, torch.Tensor]
) -> tuple[tuple[Rule, ...], dict[str, str], bool]:
    """
    Return the rules from BERT's prediction head to a `TripsLMHead`.

    Args:
        head, predictions (`str`): Names of the head in the TRIPS model and in the source.
        embeddings (`str`): Key of the word embeddings. The head's output weights are tied to them if they are equal.

    Returns:
        The rules, the source keys to leave out, and whether the weights are tied.
    """
    weight = f"{predictions}.decoder.weight"
    bias = f"{predictions}.decoder.bias"
    bias_again = f"{predictions}.bias"
    tied = weight not in source or (embeddings in source and _same(source[weight], source[embeddings]))
    left_out = {re.escape(weight): "equal to the word embeddings, which it is tied to"} if tied else {}
    if bias in source and bias_again in source:
        # Both keys name one parameter, and BERT loads the former last.
        same = _same(source[bias], source[bias_again])
        left_out[re.escape(bias_again)] = f"{'equal to' if same else 'overwritten by'} the bias that is used"
    rules = (
        Rule(rf"{head}\.(dense|LayerNorm)\.(.*)", rf"{predictions}.transform.\1.\2"),
        Rule(rf"{head}\.decoder\.weight", embeddings if tied else weight),
        Rule(rf"{head}\.decoder\.bias", bias if bias in source else bias_again),
    )
    return rules, left_out, tied


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)
