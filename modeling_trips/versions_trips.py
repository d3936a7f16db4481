"""
The supported releases of Transformers, checked when this module is imported, and what differs between them.

`configuration_trips` and `processing_trips`, which every use of a checkpoint begins with, import this module first, as
other releases lack what they import next. Before 5.10, Transformers copies from a folder only the modules that these
two import themselves, so they import all that they need.
"""

from collections.abc import Callable
from functools import wraps

import transformers
from packaging.version import Version
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg


LOWEST, BEYOND = "5.20", "6"  # as in pyproject.toml: from LOWEST on, below BEYOND
NEWEST_TESTED = "5.24"


def check_release(release: str):
    """
    Warns if `release` is newer than the tested ones.

    Raises:
        ImportError: if `release` is not supported.
    """
    supported = f"transformers>={LOWEST},<{BEYOND}"
    if not Version(LOWEST) <= Version(release) < Version(BEYOND):
        raise ImportError(f'TRIPS needs {supported}, got {release}. Run `pip install -U "{supported}"`.')
    if Version(release).release[:2] > Version(NEWEST_TESTED).release:
        logging.get_logger(__name__).warning(
            f"TRIPS was tested with transformers {LOWEST} to {NEWEST_TESTED}, got {release}. If something fails, "
            f"install {NEWEST_TESTED}."
        )


check_release(transformers.__version__)

# What `generate` and Transformers' outputs call the keys and values of the tokens written so far.
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def accept_former_cache_name(forward: Callable) -> Callable:
    """Lets a `forward` that has an argument `cache` take it as `past_key_values`, too."""
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)

    @wraps(forward)
    def renamed(*args, **kwargs):
        if CACHE_NAME in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE_NAME)
        return forward(*args, **kwargs)

    return renamed
