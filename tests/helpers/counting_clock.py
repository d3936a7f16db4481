"""A clock in place of `inspection.speed.timed` that counts MACs instead of seconds."""

from collections.abc import Callable, Sequence

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


# One round of warm-up and five timed ones, of which the first, the last, the middle one, the fastest, the slowest and
# the mean differ from the median, which is 3.
FACTORS = (100, 9, 4, 1, 2, 3)
MEDIAN = 3


class CountingClock:
    """
    Clock that returns the MACs of a step, times the factor of its round.

    Args:
        steps_per_round (`int`): number of alternating steps.
        factors (`Sequence[float]`, *optional*, defaults to `FACTORS`): one per round, including the warm-up.
    """

    def __init__(self, steps_per_round: int, factors: Sequence[float] = FACTORS):
        self.factors = [factor for factor in factors for _ in range(steps_per_round)]

    def __call__(self, step: Callable[[], object], clock: str, device: str) -> float:
        # The counter has no formula for the fused attention of a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / 2 * self.factors.pop(0)
