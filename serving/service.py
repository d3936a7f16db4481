"""
Service for `bentoml serve trips_serving.service:Trips`. BentoML does routing, batching, metrics and shutdown; `Gate`
reads the requests.
"""

import atexit
import os
import signal
import sys
import traceback
from functools import cache
from typing import Any


# BentoML reads this at import. It turns off telemetry.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml  # noqa: E402
from _bentoml_sdk import Service  # noqa: E402  # the class behind `bentoml.service`
from bentoml import IODescriptor  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402

from .errors import RequestError  # noqa: E402
from .paths import KnownPaths, add_page  # noqa: E402
from .settings import Settings  # noqa: E402


SETTINGS = Settings.from_environment()
# Seconds to receive a body, to decode its images, to wait for a batch, and to compute.
TIMEOUT = SETTINGS.read_timeout + 2 * SETTINGS.max_latency_ms / 1000 + 10
BATCHES = {"batchable": True, "max_batch_size": SETTINGS.max_batch_size, "max_latency_ms": SETTINGS.max_latency_ms}


# The supervisor also imports this module, so only workers import PyTorch.
@cache
def get_engine():
    from .engine import Engine

    return Engine(SETTINGS)


def make_gate(app):
    from .gate import Gate

    return Gate(app, SETTINGS, get_engine)


SUPERVISOR = "BENTOML_TRIPS_SUPERVISOR"  # environment variable with the process id of the supervisor


class GuardedService(Service):
    def to_asgi(self, is_main: bool = True):
        """Return the application of a worker. Without a usable model, the whole service exits."""
        from _bentoml_impl.server.app import ServiceAppFactory

        from .batching import adjust

        try:
            engine = get_engine()
        except Exception as error:
            if isinstance(error, ValueError):
                print(error, file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
            if SUPERVISOR in os.environ:
                os.kill(int(os.environ[SUPERVISOR]), signal.SIGUSR1)
            sys.exit(1)
        self.inject_config()
        factory = ServiceAppFactory(self, is_main=is_main)
        for dispatcher in factory.dispatchers.values():
            adjust(dispatcher, lambda: engine.num_preparing > 0)
        return KnownPaths(add_page(factory()))


class Items(IODescriptor):
    """Items that `Gate` made of a request."""

    items: list[Any]

    @classmethod
    async def from_http_request(cls, request: Request, serde) -> "Items":
        return cls.model_construct(items=request.state.items)


class Results(IODescriptor):
    """Object with one result per item."""

    results: list[Any]

    @classmethod
    async def to_http_response(cls, results: list, serde) -> Response:
        for result in results:
            if isinstance(result, RequestError):
                return result.response
        return JSONResponse({cls.__name__.lower(): results})


class Answers(Results):
    pass


class Captions(Results):
    pass


class Scores(Results):
    pass


class Features(Results):
    pass


@bentoml.service(
    name="trips",
    workers=SETTINGS.workers,
    http={"host": "127.0.0.1"},
    traffic={"timeout": TIMEOUT},
    service_class=GuardedService,
)
class Trips:
    def __init__(self):
        self.engine = get_engine()

    @bentoml.on_deployment
    def end_with_failed_workers():
        """Exit the supervisor with code 1 if a worker cannot start. By default it restarts the worker."""

        def end(*_):
            atexit.register(os._exit, 1)
            os.kill(os.getpid(), signal.SIGTERM)  # BentoML stops all workers

        signal.signal(signal.SIGUSR1, end)
        os.environ[SUPERVISOR] = str(os.getpid())

    @bentoml.api(input_spec=Items, output_spec=Answers, **BATCHES)
    def answer(self, items: list) -> list:
        return self.engine.compute("answer", items)

    @bentoml.api(input_spec=Items, output_spec=Captions, **BATCHES)
    def caption(self, items: list) -> list:
        return self.engine.compute("caption", items)

    @bentoml.api(input_spec=Items, output_spec=Scores, **BATCHES)
    def match(self, items: list) -> list:
        return self.engine.compute("match", items)

    @bentoml.api(input_spec=Items, output_spec=Features, **BATCHES)
    def features(self, items: list) -> list:
        return self.engine.compute("features", items)


Trips.add_asgi_middleware(make_gate)  # type: ignore[attr-defined]  # Trips is a service
