"""
Settings of the service from environment variables: `TRIPS_QUEUE` sets the field `queue`. The supervisor also reads
them, so this module does not need PyTorch.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


PREFIX = "TRIPS_"
DEFAULT = "default"  # name of the checkpoint's schedule


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


def check_model(name: str) -> str:
    """Return the folder or Hub repository of a checkpoint. Raise a `ValueError` if it cannot be one."""
    path = Path(name)
    if not name:
        raise ValueError("must be the folder or the Hub repository of a checkpoint")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError("this folder has no config.json")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ValueError("there is no such folder")
    return name


Schedules = Annotated[
    dict[str, str], BeforeValidator(lambda value: read_schedules(value) if isinstance(value, str) else value)
]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True)

    model: Annotated[str, AfterValidator(check_model)] = ""  # required in the environment
    revision: str = "main"
    device: str = "auto"
    dtype: str = "auto"
    schedules: Schedules = {}
    workers: Count = 1
    max_batch_size: Count = 32  # pairs of image and text
    max_latency_ms: Count = 30_000  # for a decoder, and for a batch
    queue: Count = 64
    max_body_bytes: Count = 8 << 20
    max_buffered_bytes: Count = 256 << 20  # of all open requests
    read_timeout: Seconds = 10.0
    max_pixels: Count = 16 << 20
    max_images: Count = 8
    max_texts: Count = 32
    max_text_length: Count = 2000
    cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    allow_urls: bool = False
    url_timeout: Seconds = 5.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """
        Raises:
            ValueError: `TRIPS_MODEL` is missing, or a variable is unknown or has an invalid value.
        """
        fields = {PREFIX + field.upper(): field for field in cls.model_fields}
        given = {name: text.strip() for name, text in environment.items() if name.startswith(PREFIX)}
        given.setdefault(PREFIX + "MODEL", "")
        if unknown := sorted(given.keys() - fields.keys()):
            raise ValueError(f"unknown settings {', '.join(unknown)}; use one of {', '.join(fields)}")
        try:
            return cls.model_validate({fields[name]: text for name, text in given.items()})
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + str(first["loc"][0]).upper()
            raise ValueError(f"{name}={given[name]}: {first['msg'].removeprefix('Value error, ')}") from error
