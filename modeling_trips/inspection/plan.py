"""
Cost and image tokens of selection schedules against the unpruned baseline, which shares its vision tower among the
texts of an image. They say nothing about accuracy.

All layers after the first layer scored by a text run once per text. With few texts per image, text guidance can start
early; with many, image guidance reduces the tokens for all texts, and text guidance starts late.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product

from modeling_trips import UNPRUNED, LayerSelection, SelectionSchedule, TripsConfig

from .cost import Cost, forward_cost


IMAGE_RATES = (0.3, 0.5, 0.7, 0.9)
TEXT_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
MIN_TOKENS = 5  # [CLS], the fused token and three patches


@dataclass(frozen=True)
class PlannedSchedule:
    """Schedule with its cost."""

    schedule: SelectionSchedule
    cost: Cost
    ratios: dict[int, float]  # MACs of pruned / unpruned, by the number of texts per image
    mean_tokens: float  # mean image tokens over the layers of the vision tower and of the fusion encoder

    @property
    def ratio(self) -> float:
        """The largest of `ratios`."""
        return max(self.ratios.values())


def candidate_schedules(config: TripsConfig) -> Iterator[SelectionSchedule]:
    """
    Yield the candidates: up to three evenly spaced layers scored by the image at one of `IMAGE_RATES`, then one layer
    scored by the text at one of `TEXT_RATES`, or two without image guidance. Layer 1 never selects, because its
    queries and keys see single patches. In a single stream all layers run per text, so the text scores all.
    """
    layers = range(2, config.vision_config.num_hidden_layers + 1)
    if config.fusion_encoder_config.fusion_type == "single_stream":
        yield from _evenly_apart(layers, 3, "text", TEXT_RATES)
        return
    yield from _evenly_apart(layers, 2, "text", TEXT_RATES)
    by_image = _evenly_apart(layers, 3, "image", IMAGE_RATES)
    for first, layer, rate in product(by_image, layers, TEXT_RATES):
        if layer > first.layers[-1]:
            by_text = LayerSelection("text", rate)
            yield SelectionSchedule((*first.layers, layer), (*first.selections, by_text))


def _evenly_apart(
    layers: Sequence[int], most: int, guidance: str, rates: Sequence[float]
) -> Iterator[SelectionSchedule]:
    """Yield schedules of one to `most` layers with equal steps between them and the same selection."""
    for size in range(1, most + 1):
        for chosen in combinations(layers, size):
            steps = {after - before for before, after in pairwise(chosen)}
            if len(steps) > 1:
                continue
            for rate in rates:
                yield SelectionSchedule(chosen, (LayerSelection(guidance, rate),) * size)


def plan_schedules(
    config: TripsConfig, schedules: Iterable[SelectionSchedule], texts_per_image: Sequence[int], text_length: int
) -> list[PlannedSchedule]:
    """
    Compute the cost of each schedule at each number of texts per image, and its image tokens.

    Raises:
        ValueError: A number is out of range.
    """
    longest = config.text_config.max_position_embeddings
    if min(texts_per_image, default=0) < 1:
        raise ValueError(f"`texts_per_image` must be numbers of at least 1, got {texts_per_image}.")
    if not 1 <= text_length <= longest:
        raise ValueError(f"`text_length` must be in 1..{longest} for this model, got {text_length}.")
    unpruned = forward_cost(config, text_length, UNPRUNED)
    is_single_stream = config.fusion_encoder_config.fusion_type == "single_stream"
    num_fusion_layers = 0 if is_single_stream else config.fusion_encoder_config.num_hidden_layers
    rows = []
    for schedule in schedules:
        cost = forward_cost(config, text_length, schedule)
        ratios = {number: cost.macs(number) / unpruned.macs(number) for number in texts_per_image}
        num_tokens = sum(cost.tokens) + num_fusion_layers * cost.tokens[-1]
        num_layers = len(cost.tokens) + num_fusion_layers
        rows.append(PlannedSchedule(schedule, cost, ratios, mean_tokens=num_tokens / num_layers))
    return rows


def plan_selection(
    config: TripsConfig, texts_per_image: Sequence[int], text_length: int, budget: float
) -> list[PlannedSchedule]:
    """
    Return the `candidate_schedules` within a budget that keep more image tokens than all cheaper ones, and at least
    three patches, the cheapest first.

    Args:
        config ([`TripsConfig`]): Configuration of the model.
        texts_per_image (`Sequence[int]`): Texts that share an image. A schedule must fit the budget at each number.
        text_length (`int`): Tokens per text.
        budget (`float`): Largest share of the unpruned model's MACs, in (0, 1].

    Raises:
        ValueError: A number is out of range.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"`budget` must be in (0, 1], a share of the unpruned cost, got {budget}.")
    rows = plan_schedules(config, candidate_schedules(config), texts_per_image, text_length)
    rows = [row for row in rows if row.ratio <= budget and row.cost.tokens[-1] >= MIN_TOKENS]
    front: list[PlannedSchedule] = []
    for row in sorted(rows, key=lambda row: (row.ratio, -row.mean_tokens)):
        if not front or row.mean_tokens > front[-1].mean_tokens:
            front.append(row)
    return front
