"""
Settings of the service from environment variables: `TRIPS_QUEUE` sets the field `queue`. The supervisor also reads
them, so this module does not need PyTorch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path


PREFIX = "TRIPS_"
DEFAULT = "default"  # name of the checkpoint's schedule
SWITCHES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def read_schedules(text: str) -> dict[str, str]:
    """
    Parse `"fast=5:text:0.3,10:text:0.3;full="` to schedules by name. An empty schedule keeps all patches.

    Raises:
        ValueError: An entry has no name, or its name exists.
    """
    schedules: dict[str, str] = {}
    for entry in filter(None, map(str.strip, text.split(";"))):
        name, equals, schedule = (part.strip() for part in entry.partition("="))
        if not equals or not name or name in (DEFAULT, *schedules):
            raise ValueError(
                f"each schedule must have a unique name other than {DEFAULT!r}, as in fast=5:text:0.3, got {entry!r}"
            )
        schedules[name] = schedule
    return schedules


def _read_model(text: str) -> str:
    path = Path(text)
    if not text:
        raise ValueError("must be the folder or the Hub repository of a checkpoint")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError("this folder has no config.json")
    if not path.is_dir() and (path.is_absolute() or text.startswith(".") or len(path.parts) > 2):
        raise ValueError("there is no such folder")
    return text


def _read_switch(text: str) -> bool:
    if text.lower() not in SWITCHES:
        raise ValueError(f"must be one of {', '.join(SWITCHES)}")
    return SWITCHES[text.lower()]


def _read_count(text: str) -> int:
    if int(text) < 1:
        raise ValueError("must be at least 1")
    return int(text)


def _read_size(text: str) -> int:
    if int(text) < 0:
        raise ValueError("must be at least 0")
    return int(text)


def _read_seconds(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError("must be a number of seconds above 0")
    return float(text)


def _setting(default, read, help: str):
    metadata = {"read": read, "help": help}
    return (
        field(default_factory=dict, metadata=metadata)
        if default is dict
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True)
class Settings:
    model: str = _setting("", _read_model, "folder or Hub repository of a checkpoint, or folder of an exported model")
    revision: str = _setting("main", str, "branch, tag or commit on the Hub")
    device: str = _setting("auto", str, "device; auto: cuda if available")
    dtype: str = _setting("auto", str, "dtype of the weights, such as bfloat16; auto: as saved")
    schedules: Mapping[str, str] = _setting(
        dict, read_schedules, "named schedules for requests: fast=5:text:0.3,10:text:0.3;full="
    )
    workers: int = _setting(1, _read_count, "processes, each with its own model, queue and cache")
    max_batch_size: int = _setting(32, _read_count, "pairs of image and text per batch")
    max_latency_ms: int = _setting(30_000, _read_count, "maximum wait for a decoder, and for a batch (503)")
    queue: int = _setting(64, _read_count, "maximum requests in progress or queued (503)")
    max_body_bytes: int = _setting(8 << 20, _read_count, "maximum bytes of a request (413)")
    max_buffered_bytes: int = _setting(256 << 20, _read_count, "maximum bytes of all open requests (503)")
    read_timeout: float = _setting(10.0, _read_seconds, "seconds to receive a body (408)")
    max_pixels: int = _setting(16 << 20, _read_count, "maximum pixels of an image (413)")
    max_images: int = _setting(8, _read_count, "maximum images of a request (422)")
    max_texts: int = _setting(32, _read_count, "maximum texts of a request (422)")
    max_text_length: int = _setting(2000, _read_count, "maximum characters of a text (422)")
    cache_bytes: int = _setting(256 << 20, _read_size, "maximum bytes of cached image states; 0: no cache")
    allow_urls: bool = _setting(False, _read_switch, "allow image URLs at public addresses")
    url_timeout: float = _setting(5.0, _read_seconds, "seconds to fetch an image from a URL")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """
        Raises:
            ValueError: `TRIPS_MODEL` is missing, or a variable is unknown or has an invalid value.
        """
        by_name = {PREFIX + one.name.upper(): one for one in fields(cls)}
        unknown = sorted(name for name in environment if name.startswith(PREFIX) and name not in by_name)
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; use one of {', '.join(by_name)}")
        values = {}
        for name, text in {PREFIX + "MODEL": "", **environment}.items():
            if name in by_name:
                one = by_name[name]
                try:
                    values[one.name] = one.metadata["read"](text.strip())
                except ValueError as error:
                    raise ValueError(f"{name}={text}: {error}") from error
        return cls(**values)
