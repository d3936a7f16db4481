"""Starlette application of the service: it reads, limits and validates requests, and answers them in batches."""

import asyncio
import os
import signal
import sys
import time
import traceback
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import CancelScope, CapacityLimiter, create_task_group, fail_after, to_thread
from huggingface_hub.errors import StrictDataclassError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .engine import DECODERS, Batcher, Engine, Item, ItemImage
from .schemas import JSON, REPLIES, describe, request_models
from .settings import FAILURE, PREFIX, Settings


DRAINED = 4  # multiple of the limit that is read of a large body, so that the client reads the error
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

IN_PROGRESS = Gauge("trips_requests_in_progress", "Requests in progress or queued.", multiprocess_mode="livesum")
SECONDS = Histogram("trips_request_seconds", "Time to answer a request.", ["endpoint", "status"])


def create_app() -> Starlette:
    """Load the model of the environment's settings. Without a usable model, the service ends with the reason."""
    try:
        settings = Settings.from_environment()
        return Service(Engine(settings), settings).app
    except Exception as error:
        if not isinstance(error, (HTTPException, OSError, RuntimeError, StrictDataclassError, ValueError)):
            traceback.print_exc()
        given = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(PREFIX)]
        reason = " ".join(str(error).split())
        failure = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], FAILURE)
        failure.write_text(f"The service cannot start with {', '.join(given)}: {reason}")
        os.kill(os.getppid(), signal.SIGTERM)
        sys.exit(1)


def metrics(request: Request) -> Response:
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # of all workers
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def read_page(script: str = "page.js") -> Response:
    """Return the page that runs one of its two scripts."""
    page = Path(__file__).with_name("page.html").read_text()
    return HTMLResponse(page.replace("page.js", script), headers=PAGE_HEADERS)


def refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "The service failed on this request."}, 500)


def overloaded(message: str) -> HTTPException:
    return HTTPException(503, f"{message} Try again later.", headers={"Retry-After": "1"})


class Service:
    """Endpoints of the model of an engine."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine = engine
        self.settings = settings
        models = request_models(settings)
        self.models = {name: models[name] for name in engine.endpoints}
        self.paths = ", ".join(f"/{name}" for name in self.models)
        self.batcher = Batcher(engine.compute, settings.max_batch_size)
        self.slots = asyncio.Semaphore(settings.queue)
        self.buffered_bytes = 0
        self.decoders = CapacityLimiter(DECODERS)
        alive = PlainTextResponse("ok")  # a worker listens when its model is loaded
        routes = [Route(f"/{name}", self.answer, methods=["POST"]) for name in self.models]
        routes += [
            Route("/livez", alive),
            Route("/readyz", alive),
            Route("/metrics", metrics),
            Route("/openapi.json", JSONResponse(describe(f"TRIPS: {Path(settings.model).name}", self.models))),
            Route("/", read_page()),
            Route("/docs", read_page("docs.js")),
        ]
        for name in ("docs.js", "page.css", "page.js"):
            file = Path(__file__).with_name(name)
            routes.append(Route(f"/{name}", FileResponse(file, headers=PAGE_HEADERS)))
        self.app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: refuse, 404: self.refuse_path, Exception: refuse},
            lifespan=self.lifespan,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=settings.allowed_hosts, www_redirect=False)],
        )
        self.app.router.redirect_slashes = False  # a redirect would repeat the client's Host

    @asynccontextmanager
    async def lifespan(self, app: Starlette):
        async with create_task_group() as tasks:
            tasks.start_soon(self.batcher.run)
            print(f"Ready to answer {self.paths}", flush=True)
            yield
            tasks.cancel_scope.cancel()
        self.engine.decoder.close()

    def refuse_path(self, request: Request, error: Exception) -> Response:
        message = f"Unknown path. This checkpoint supports {self.paths}; see the page /docs."
        return JSONResponse({"error": message}, 404)

    async def answer(self, request: Request) -> Response:
        """Answer a request to the model."""
        endpoint = request.url.path.strip("/")
        start = time.perf_counter()
        try:
            self.check_queue()
            items, images = await self.read(endpoint, request)
            self.check_queue()
            async with self.slots:
                with IN_PROGRESS.track_inprogress():
                    results = await self.compute(items, images, request)
            (field,) = REPLIES[endpoint].model_fields
            response: Response = JSONResponse({field: results})
        except HTTPException as error:
            response = refuse(request, error)
        SECONDS.labels(endpoint, response.status_code).observe(time.perf_counter() - start)
        return response

    def check_queue(self):
        if self.slots.locked():
            raise overloaded("Too many requests are waiting.")

    async def compute(self, items: list[Item], images: list[ItemImage], request: Request) -> list:
        """Return the results of items, which nobody waits for any more when the client of the request disconnects."""
        seconds = self.settings.max_latency_ms / 1000
        leaving = asyncio.ensure_future(request.receive())
        try:
            with CancelScope() as scope, fail_after(seconds):
                leaving.add_done_callback(lambda _: scope.cancel())
                for image in images:
                    if image.states is None:
                        await to_thread.run_sync(self.engine.decode, image, limiter=self.decoders)
                return await self.batcher.submit(items)
        except TimeoutError as error:
            raise overloaded(f"There was no result within {seconds:g} s.") from error
        finally:
            leaving.cancel()
        raise HTTPException(400, "The client disconnected.")

    async def read(self, endpoint: str, request: Request) -> tuple[list[Item], list[ItemImage]]:
        """Return the items of a request, and its images. Bytes of its body count among those of all."""
        media_type = request.headers.get("content-type", "").partition(";")[0]
        if media_type.strip().lower() != JSON:
            raise HTTPException(415, f"The Content-Type must be {JSON}.")
        limit = self.settings.max_body_bytes
        seconds = self.settings.read_timeout
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    self.buffered_bytes += len(chunk)
                    if self.buffered_bytes > self.settings.max_buffered_bytes:
                        raise overloaded("Too many bytes are being received.")
                    if len(body) > DRAINED * limit:
                        break
            if len(body) > limit:
                raise HTTPException(413, f"The body must have at most {limit:,} bytes.")
            return await to_thread.run_sync(self.prepare, endpoint, bytes(body))
        except TimeoutError as error:
            raise HTTPException(408, f"The body did not arrive within {seconds:g} seconds.") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The client disconnected.") from error
        finally:
            self.buffered_bytes -= len(body)

    def prepare(self, endpoint: str, content: bytes) -> tuple[list[Item], list[ItemImage]]:
        """Validate a request, look up its images and tokenize its texts."""
        inputs = validate(self.models[endpoint], content)
        (text_field,) = {"questions", "prompts", "texts"} & inputs.keys()
        texts = inputs.pop(text_field)
        tokens = self.engine.prepare_texts(text_field, texts)
        files = {f"images.{row}": file for row, file in enumerate(inputs.pop("images", []))}
        if "image" in inputs:
            files["image"] = inputs.pop("image")
        # The rest are fields of `Item`.
        decodes = inputs.get("kept_patches", False)
        keep_rate = inputs.get("keep_rate")
        images = [self.engine.find_image(*named, decodes, keep_rate) for named in files.items()]
        items = []
        if endpoint == "features":
            for row, image in enumerate(images):
                items.append(Item(endpoint, image=image, place={"image": row}))
            for row, tokens_of_text in enumerate(tokens):
                items.append(Item(endpoint, tokens=tokens_of_text, place={"text": row}))
        else:
            for image_row, image in enumerate(images):
                for text_row, text in enumerate(texts):
                    item = Item(
                        endpoint,
                        image=image,
                        text=text,
                        tokens=tokens[text_row],
                        place={"image": image_row, "text": text_row},
                        **inputs,
                    )
                    items.append(item)
        if not items:
            raise HTTPException(422, "The request must have an image or a text.")
        return items, images


def validate(model: type[BaseModel], body: bytes) -> dict[str, Any]:
    """Return the fields of a request. The `HTTPException` for one that does not fit names the field."""
    try:
        content = from_json(body)
        if isinstance(content, dict):
            for name in content:  # pydantic is slow with many unknown fields
                if name not in model.model_fields:
                    known = ", ".join(model.model_fields)
                    raise HTTPException(422, f"{name:.100}: The field is unknown. Use {known}.")
        return dict(model.model_validate(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        message = first["msg"].removeprefix("Value error, ")
        raise HTTPException(422, f"{place}: {message}.") from error
    except ValueError as error:
        raise HTTPException(400, f"The body is not valid JSON: {error}") from error
