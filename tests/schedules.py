"""A schedule as plain dictionaries, by layer."""

from modeling_trips import LayerSelection, SelectionSchedule, TripsVisionConfig


def rates_of(config: TripsVisionConfig) -> dict[int, float]:
    return {layer: selection.keep_rate for layer, selection in config.schedule.by_layer.items()}


def guidances_of(config: TripsVisionConfig) -> dict[int, str]:
    return {layer: selection.guidance for layer, selection in config.schedule.by_layer.items()}


def make_schedule(layers, guidances, keep_rates) -> SelectionSchedule:
    return SelectionSchedule(tuple(layers), tuple(map(LayerSelection, guidances, keep_rates)))


def guidances_in(schedule: SelectionSchedule) -> list[str]:
    return [selection.guidance for selection in schedule.selections]
