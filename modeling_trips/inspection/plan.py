"""
Search for a selection schedule: cost and image tokens of candidates against the unpruned baseline, which shares its
vision tower among the texts of an image.

All layers after the first layer scored by a text run once per text. With few texts per image, text guidance can start
early; with many, image guidance reduces the tokens for all texts, and text guidance starts late.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from modeling_trips import UNPRUNED, LayerSelection, SelectionSchedule, TripsConfig

from .cost import Cost, forward_cost


IMAGE_RATES = (0.3, 0.5, 0.7, 0.9)
TEXT_RATES = (0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class PlannedSchedule:
    """
    Schedule with its cost.

    Args:
        schedule ([`SelectionSchedule`]): The schedule.
        cost ([`Cost`]): Cost of an image and of each of its texts.
        ratios (`dict[int, float]`): MACs of pruned / unpruned, by the number of texts per image.
        mean_tokens (`float`): Mean image tokens over the layers of the vision tower and of the fusion encoder.
    """

    schedule: SelectionSchedule
    cost: Cost
    ratios: dict[int, float]
    mean_tokens: float

    def excess(self, budgets: dict[int, float]) -> float:
        """Return the largest cost over budget among the numbers of texts per image. Up to 1, it fits all budgets."""
        return max(self.ratios[number] / budget for number, budget in budgets.items())


@dataclass(frozen=True)
class SelectionPlan:
    """
    Result of [`plan_selection`].

    Args:
        candidates (`list[PlannedSchedule]`): All candidates that keep `min_kept` of the tokens, in the order of their
            cost over the budget; among equals, those that keep more tokens first.
        affordable (`list[PlannedSchedule]`): Those of them that fit the budget; possibly none.
        unpruned ([`PlannedSchedule`]): The unpruned baseline.
    """

    candidates: list[PlannedSchedule]
    affordable: list[PlannedSchedule]
    unpruned: PlannedSchedule

    @property
    def cheapest(self) -> PlannedSchedule | None:
        """The cheapest affordable schedule."""
        return self.affordable[0] if self.affordable else None

    @property
    def most_tokens(self) -> PlannedSchedule | None:
        """The affordable schedule that keeps the most tokens."""
        return max(self.affordable, key=lambda row: row.mean_tokens, default=None)

    @property
    def front(self) -> list[PlannedSchedule]:
        """The candidates that keep more tokens than all cheaper ones, cheap ones first."""
        front = self.candidates[:1]
        for row in self.candidates:
            if row.mean_tokens > front[-1].mean_tokens:
                front.append(row)
        return front


def candidate_schedules(config: TripsConfig, guided_by_text: bool = True) -> Iterator[SelectionSchedule]:
    """
    Yield the candidates: zero to three evenly spaced layers scored by the image at one of `IMAGE_RATES`, then at most
    one layer scored by the text at one of `TEXT_RATES`, or two without image guidance. Layer 1 never selects, because
    its queries and keys see single patches. In a single stream all layers run per text, so the text scores all.

    Args:
        config ([`TripsConfig`]): Configuration of the model.
        guided_by_text (`bool`, *optional*, defaults to `True`): Require a layer scored by the text, as in the paper.
    """
    last = config.vision_config.num_hidden_layers
    layers = range(2, last + 1)
    by_image = [*_schedules(_evenly_apart(layers, 3), "image", IMAGE_RATES)]
    if config.fusion_encoder_config.fusion_type == "single_stream":
        yield from _schedules(_evenly_apart(layers, 3), "text", sorted({*IMAGE_RATES, *TEXT_RATES}))
        return
    if not guided_by_text:
        yield from by_image
    yield from _schedules(_evenly_apart(layers, 2), "text", TEXT_RATES)
    for first, layer, rate in product(by_image, layers, TEXT_RATES):
        if layer > first.layers[-1]:
            yield SelectionSchedule((*first.layers, layer), (*first.selections, LayerSelection("text", rate)))


def _evenly_apart(layers: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Return sets of one to `most` layers with equal steps between them."""
    sets = [chosen for size in range(1, most + 1) for chosen in combinations(layers, size)]
    return [chosen for chosen in sets if len({b - a for a, b in zip(chosen, chosen[1:])}) <= 1]


def _schedules(
    layer_sets: Iterable[tuple[int, ...]], guidance: str, rates: Iterable[float]
) -> Iterator[SelectionSchedule]:
    for layers, rate in product(layer_sets, rates):
        yield SelectionSchedule(layers, (LayerSelection(guidance, rate),) * len(layers))


def plan_schedules(
    config: TripsConfig, schedules: Iterable[SelectionSchedule], texts_per_image: Sequence[int], text_length: int
) -> list[PlannedSchedule]:
    """Compute the cost of each schedule at each number of texts per image, and its image tokens."""
    unpruned = forward_cost(config, text_length, UNPRUNED)
    num_fusion_layers = config.fusion_encoder_config.num_hidden_layers
    if config.fusion_encoder_config.fusion_type == "single_stream":
        num_fusion_layers = 0
    rows = []
    for schedule in schedules:
        cost = forward_cost(config, text_length, schedule)
        read = sum(cost.tokens) + num_fusion_layers * cost.tokens[-1]
        ratios = {number: cost.macs(number) / unpruned.macs(number) for number in texts_per_image}
        rows.append(PlannedSchedule(schedule, cost, ratios, read / (len(cost.tokens) + num_fusion_layers)))
    return rows


def plan_selection(
    config: TripsConfig,
    texts_per_image: int | Sequence[int],
    text_length: int,
    budget: float | Sequence[float],
    min_kept: float = 0.1,
    guided_by_text: bool = True,
) -> SelectionPlan:
    """
    Find the cheapest of the `candidate_schedules` and the one with the most tokens within a budget, by `forward_cost`.
    The plan does not predict accuracy.

    Args:
        config ([`TripsConfig`]): Configuration of the model.
        texts_per_image (`int` or `Sequence[int]`): Texts that share an image. A schedule must fit the budget of each
            number.
        text_length (`int`): Tokens per text.
        budget (`float` or `Sequence[float]`): Largest share of the unpruned model's MACs, in (0, 1]: one value, or one
            per number in `texts_per_image`.
        min_kept (`float`, *optional*, defaults to 0.1): Smallest share of the image tokens after the vision tower.
        guided_by_text (`bool`, *optional*, defaults to `True`): Require a layer scored by the text.

    Returns:
        [`SelectionPlan`]

    Raises:
        ValueError: A number is out of range.
    """
    numbers = [texts_per_image] if isinstance(texts_per_image, int) else list(texts_per_image)
    shares = [budget] * len(numbers) if isinstance(budget, (int, float)) else list(budget)
    longest = config.text_config.max_position_embeddings
    for name, value, fits, allowed in (
        ("texts_per_image", numbers, numbers and min(numbers) >= 1, "one or several numbers of at least 1"),
        ("text_length", text_length, 1 <= text_length <= longest, f"in 1..{longest} for this model"),
        ("budget", shares, all(0 < share <= 1 for share in shares), "in (0, 1], a share of the unpruned cost"),
        ("budget", shares, len(shares) == len(numbers), f"one number, or one for each of {numbers} texts per image"),
        ("min_kept", min_kept, 0 <= min_kept < 1, "in [0, 1), a share of the image tokens"),
    ):
        if not fits:
            raise ValueError(f"`{name}` must be {allowed}, got {value}.")
    budgets = dict(zip(numbers, shares))
    schedules = [UNPRUNED, *candidate_schedules(config, guided_by_text)]
    unpruned, *rows = plan_schedules(config, schedules, numbers, text_length)
    rows = [row for row in rows if row.cost.tokens[-1] >= min_kept * unpruned.cost.tokens[-1]]
    candidates = cheapest_first(rows, budgets)
    return SelectionPlan(candidates, [row for row in candidates if row.excess(budgets) <= 1], unpruned)


def cheapest_first(rows: Iterable[PlannedSchedule], budgets: dict[int, float]) -> list[PlannedSchedule]:
    """Sort schedules by their cost over the budget; among equals, those that keep more tokens first."""
    return sorted(rows, key=lambda row: (row.excess(budgets), -row.mean_tokens))
