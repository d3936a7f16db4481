"""A selection schedule: which layers select, who guides each, and what share of its tokens it keeps."""

from dataclasses import dataclass
from itertools import groupby

from modeling_trips import TripsVisionConfig


@dataclass(frozen=True)
class Schedule:
    """
    Args:
        layers (`tuple[int, ...]`): those that select, numbered from 1, ascending.
        guidances (`tuple[str, ...]`): who ranks the tokens of each: `"text"`, `"image"` or `"random"`.
        keep_rates (`tuple[float, ...]`): the share that each of them keeps.
    """

    layers: tuple[int, ...]
    guidances: tuple[str, ...]
    keep_rates: tuple[float, ...]

    @classmethod
    def of(cls, config: TripsVisionConfig) -> "Schedule":
        """The schedule of a configuration, without the layers that drop nothing."""
        rates, guidances = config.selection_schedule, config.guidance_schedule
        return cls(tuple(rates), tuple(guidances.values()), tuple(rates.values()))

    @classmethod
    def parse(cls, text: str, keep_rate: float = 0.7) -> "Schedule":
        """
        Args:
            text (`str`): layers with their guidance and keep rate, as in `"5:image:0.7,12:text:0.3"`; `"5,10"` and
                `"5:image,10"` leave out what is `"text"` or the common rate.
            keep_rate (`float`, *optional*, defaults to 0.7): of the layers that name none.

        Raises:
            ValueError: if an entry is not of that form. Whether it fits a model, its configuration says.
        """
        entries = [_parse_entry(entry, keep_rate) for entry in text.split(",")]
        return cls(*zip(*entries))

    @property
    def selecting(self) -> dict[int, tuple[str, float]]:
        """Guidance and keep rate by layer number, of the layers that drop something."""
        entries = zip(self.layers, self.guidances, self.keep_rates)
        return {layer: (guidance, rate) for layer, guidance, rate in entries if rate < 1.0}

    @property
    def is_guided_by_text(self) -> bool:
        return any(guidance == "text" for guidance, _ in self.selecting.values())

    @property
    def config_fields(self) -> dict:
        """Fields of [`TripsConfig`]: one guidance and one rate where all layers have the same."""
        return {
            "selection_layers": list(self.layers),
            "keep_rate": _one_or_list(self.keep_rates),
            "selection_guidance": _one_or_list(self.guidances),
        }

    def __str__(self) -> str:
        pairs = zip(self.layers, zip(self.guidances, self.keep_rates))
        groups = groupby(pairs, key=lambda pair: pair[1])
        parts = [f"{', '.join(str(layer) for layer, _ in group)} {who} x {rate:g}" for (who, rate), group in groups]
        return "; ".join(parts) or "unpruned"


def _parse_entry(entry: str, keep_rate: float) -> tuple[int, str, float]:
    layer, guidance, rate = (*entry.split(":"), "", "")[:3]
    try:
        if entry.count(":") > 2:
            raise ValueError
        return int(layer), guidance or "text", float(rate or keep_rate)
    except ValueError as error:
        raise ValueError(
            f"A schedule is layers with their guidance and keep rate, as in 5:image:0.7,12:text:0.3; got {entry!r}."
        ) from error


def _one_or_list(values: tuple):
    return values[0] if len(set(values)) == 1 else list(values)


UNPRUNED = Schedule((), (), ())

__all__ = ["UNPRUNED", "Schedule"]
