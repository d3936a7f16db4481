"""Schedules as dictionaries by layer."""

from modeling_trips import LayerSelection, SelectionSchedule


def rates_of(config):
    return {layer: selection.keep_rate for layer, selection in config.schedule.by_layer.items()}


def guidances_of(config):
    return {layer: selection.guidance for layer, selection in config.schedule.by_layer.items()}


def schedule_of(layers, keep_rate=0.7, guidance="text"):
    """Return a schedule with one rate and one guidance for all layers, or one for each."""
    rates = keep_rate if isinstance(keep_rate, list) else [keep_rate] * len(layers)
    guidances = guidance if isinstance(guidance, list) else [guidance] * len(layers)
    selections = [LayerSelection(guidance=guidance, keep_rate=rate) for guidance, rate in zip(guidances, rates)]
    return SelectionSchedule(tuple(layers), tuple(selections))
