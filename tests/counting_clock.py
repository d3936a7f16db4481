"""A clock of `inspection.speed.CLOCKS` that counts the work of a step in place of its seconds."""

from collections.abc import Callable, Sequence

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


# One round of warm-up and five timed ones, of which the first, the last, the middle one, the fastest, the slowest and
# the mean differ from the median, which is 3.
FACTORS = (100, 9, 4, 1, 2, 3)
MEDIAN = 3


class CountingClock:
    """
    Returns the multiply-accumulates of a step, times the factor of its round: the seconds of a machine that does one
    per second, and is slower in some rounds.

    Args:
        steps_per_round (`int`): how many steps take their turns.
        factors (`Sequence[float]`, *optional*, defaults to `FACTORS`): one per round, the warm-up included.
    """

    def __init__(self, steps_per_round: int, factors: Sequence[float] = FACTORS):
        self.factors = [factor for factor in factors for _ in range(steps_per_round)]

    def __call__(self, step: Callable[[], object], device: str) -> float:
        # The counter has no formula for the fused attention of a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / 2 * self.factors.pop(0)
