"""Settings of the service from environment variables: `TRIPS_QUEUE` sets the field `queue`."""

import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


PREFIX = "TRIPS_"
OF_SCRIPTS = {"TRIPS_TRACEBACK", "TRIPS_ANY_VLLM"}  # variables with the prefix that are not settings of the service
FAILURE = "failure"  # file in the folder of metrics: why the model could not be loaded


def read_list(text: str) -> list[str]:
    """Parse `"localhost, *.example.org"`."""
    return [part.strip() for part in text.split(",")]


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, alias_generator=lambda field: PREFIX + field.upper()
    )

    model: Annotated[str, Field(min_length=1)]
    revision: str = "main"
    device: str = "auto"
    dtype: str = "auto"
    schedule: str | None = None  # in place of the checkpoint's
    keep_rates: Annotated[list[Rate], BeforeValidator(read_list)] = []  # that a request may choose from
    allowed_hosts: Annotated[list[str], BeforeValidator(read_list)] = ["127.0.0.1", "localhost"]  # "*": any
    workers: Count = 1
    max_batch_size: Count = 32  # pairs of image and text
    max_latency_ms: Count = 30_000  # to decode images and to compute results
    queue: Count = 64
    max_body_bytes: Count = 8 << 20
    max_buffered_bytes: Count = 256 << 20  # of all open requests
    read_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0  # seconds
    max_pixels: Count = 16 << 20
    max_images: Count = 8
    max_texts: Count = 32
    max_text_length: Count = 2000
    cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Raise a `ValueError` if `TRIPS_MODEL` is missing, or a variable is unknown or has an invalid value."""
        given = {}
        for name, value in environment.items():
            if name.startswith(PREFIX) and name not in OF_SCRIPTS:
                given[name] = value.strip()
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = []
            for one in error.errors():
                variable = str(one["loc"][0])
                faults.append(f"{variable}={given.get(variable, '')}: {one['msg']}")
            settings = ", ".join(str(field.alias) for field in cls.model_fields.values())
            raise ValueError(f"{'; '.join(faults)}. The settings are {settings}.") from error
