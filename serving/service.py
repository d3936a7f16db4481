"""
The service itself, for `bentoml serve trips_serving.service:Trips`: BentoML routes, batches, measures and shuts down;
what comes in was read at the gate.
"""

import atexit
import os
import signal
import sys
import traceback
from functools import cache
from typing import Any


# Before the import, which reads it: who serves a model tells nobody of it.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml  # noqa: E402
from _bentoml_sdk import Service  # noqa: E402  # what `bentoml.service` makes, and takes a class of in its place
from bentoml import IODescriptor  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402

from .errors import RequestError  # noqa: E402
from .paths import KnownPaths, add_page  # noqa: E402
from .settings import Settings  # noqa: E402


SETTINGS = Settings.from_environment()
# Seconds for a body to arrive, for its images to be decoded and its batch to come up, and for the work itself.
TIMEOUT = SETTINGS.read_timeout + 2 * SETTINGS.max_latency_ms / 1000 + 10
BATCHES = {"batchable": True, "max_batch_size": SETTINGS.max_batch_size, "max_latency_ms": SETTINGS.max_latency_ms}


# The process that watches over the workers imports this module, too: what needs PyTorch is imported by workers alone.
@cache
def get_engine():
    from .engine import Engine

    return Engine(SETTINGS)


def make_gate(app):
    from .gate import Gate

    return Gate(app, SETTINGS, get_engine)


SUPERVISOR = "BENTOML_TRIPS_SUPERVISOR"  # variable with the id of the process that starts the workers


class GuardedService(Service):
    def to_asgi(self, is_main: bool = True):
        """The application of a worker. Without a model that can be served, all of the service ends."""
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
    """What the gate made of a request."""

    items: list[Any]

    @classmethod
    async def from_http_request(cls, request: Request, serde) -> "Items":
        return cls.model_construct(items=request.state.items)


class Results(IODescriptor):
    """One per item, in an object that says what they are."""

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
        """Let a worker that cannot start end the supervisor with exit code 1; it would start the worker again."""

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


Trips.add_asgi_middleware(make_gate)  # type: ignore[attr-defined]  # `bentoml.service` makes a service of it
