"""Faults of bad rows, and the choice between stopping and skipping."""

import logging
from collections import Counter
from dataclasses import dataclass


logger = logging.getLogger(__name__)

SHOWN = 5  # faults that an error names


def printable(text: str) -> str:
    """Return a text with lone surrogates, which cannot be encoded, escaped as `\\ud800`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class BadRowError(ValueError):
    """
    Error of a row that cannot be used.

    Args:
        reason (`str`): The fault, the same text for all rows that have it.
        detail (`str`, *optional*, defaults to `""`): The value at fault.
    """

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, printable(detail)
        super().__init__(f"{self.reason} ({self.detail})" if detail else reason)


@dataclass(frozen=True)
class Fault:
    """The fault of a row or pair: its source, a reason that rows share, and the value."""

    source: str
    reason: str
    detail: str = ""

    @property
    def error(self) -> str:
        return str(BadRowError(self.reason, self.detail))

    def __str__(self) -> str:
        return f"{self.source}: {self.error}"


@dataclass(frozen=True)
class BadRows:
    """
    Options for bad rows.

    Args:
        skip (`bool`, *optional*, defaults to `False`):
            Whether to skip bad rows with a warning that counts them, instead of raising an error.
        image_check (`str`, *optional*):
            Check of images: `"header"`, `"verify"` or `"decode"`, see `inspect_image`. Default: `"decode"` if rows are
            skipped, else `"verify"`. Scenes and easy-VQA are only checked if it is given.
        patch_size (`int`, *optional*, defaults to 1):
            Side of the model's patches in pixels. Images with a shorter side cannot be used.
        collected (`list[Fault]`, *optional*):
            List that receives the faults. Bad rows are then left out and no error is raised.
    """

    skip: bool = False
    image_check: str | None = None
    patch_size: int = 1
    collected: list[Fault] | None = None

    def settle(self, faults: list[Fault], name: str, total: int):
        """
        Collect, skip or raise the faults of a split of `total` rows.

        Raises:
            `ValueError`: The faults are neither collected nor skipped. The message names the first few.
        """
        if self.collected is not None:
            self.collected.extend(faults)
        elif faults and not self.skip:
            raise ValueError(_described(faults, name, total))
        elif faults:
            reasons = Counter(fault.reason for fault in faults)
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            logger.warning(f"Skipped {len(faults)} of the {total} rows of {name} ({counts}).")


def _described(faults: list[Fault], name: str, total: int) -> str:
    lines = [f"{len(faults)} of the {total} rows of {name} cannot be used:"]
    lines += [f"  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    return "\n".join([*lines, "Mend them, or leave them out with --skip_bad_rows."])
