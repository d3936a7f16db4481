"""Middleware that reads, limits and validates requests."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager

from anyio import CapacityLimiter, fail_after, to_thread
from prometheus_client import Gauge
from starlette.datastructures import Headers, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .engine import DECODERS, Engine
from .errors import RequestError
from .images import fetch, from_base64, is_url
from .openapi import describe
from .requests import Item, Picture, ServiceRequest, images_of, items_of, request_models, texts_of, validate
from .settings import Settings


VALIDATORS = 2  # threads that read JSON and texts
CLIENT_LEFT = 499  # BentoML needs a response after a disconnect
DRAINED = 4  # multiple of the limit that is read of a large body, so that the client reads the answer
IN_PROGRESS = Gauge("trips_requests_in_progress", "Requests in progress or queued.", multiprocess_mode="livesum")


class Disconnected(Exception):
    """Client that disconnected before its request was complete."""


class Gate:
    """
    ASGI middleware that adds the `Item`s of requests to the model to `scope["state"]`. Other requests do not change.

    Args:
        app: Wrapped application.
        settings (`Settings`): Settings of the service.
        get_engine: Function that returns the loaded engine.
    """

    def __init__(self, app, settings: Settings, get_engine: Callable[[], Engine]):
        self.app = app
        self.settings = settings
        self.get_engine = get_engine
        self.models = request_models(settings)
        self.in_progress = 0
        self.buffered_bytes = 0
        # Fields of JSON objects, characters of texts and addresses of images may be colons.
        self.max_colons = 100 + settings.max_texts * settings.max_text_length + 2 * settings.max_images
        self.validators = CapacityLimiter(VALIDATORS)
        self.decoders = CapacityLimiter(DECODERS)

    async def __call__(self, scope, receive, send):
        name = scope.get("path", "").strip("/")
        if scope["type"] == "http" and name == "docs.json":
            document = describe({one: self.models[one] for one in self.get_engine().endpoints})
            return await JSONResponse(document)(scope, receive, send)
        if scope["type"] != "http" or scope["method"] != "POST" or name not in self.models:
            return await self.app(scope, receive, send)
        try:
            self.check_offer(name)
            self.check_queue()
            async with self.body_of(scope, receive) as body:
                request = await self.read(name, scope, body)
            self.check_queue()
            with self.counted():
                scope.setdefault("state", {})["items"] = await self.prepare(name, request)
                del body, request  # frees memory during the wait
                await self.app(scope, receive, send)
        except Disconnected:
            await Response(status_code=CLIENT_LEFT)(scope, receive, send)
        except RequestError as error:
            await error.response(scope, receive, send)

    def check_offer(self, name: str):
        offered = self.get_engine().endpoints
        if name not in offered:
            raise RequestError(
                404, f"This checkpoint supports {', '.join(f'/{one}' for one in offered)}, got /{name}."
            )

    def check_queue(self):
        if self.in_progress >= self.settings.queue:
            raise RequestError(503, "Too many requests are waiting. Try again later.")

    @asynccontextmanager
    async def body_of(self, scope, receive) -> AsyncIterator[bytes]:
        """Yield the body and count its bytes among those of all open requests."""
        held = 0
        try:
            try:
                async with asyncio.timeout(self.settings.read_timeout):
                    body = bytearray()
                    async for chunk in self.chunks_of(scope, receive):
                        held += len(chunk)
                        self.buffered_bytes += len(chunk)
                        if self.buffered_bytes > self.settings.max_buffered_bytes:
                            raise RequestError(503, "Too many bytes are being received. Try again later.")
                        body += chunk
            except TimeoutError as error:
                seconds = self.settings.read_timeout
                raise RequestError(408, f"The body did not arrive within {seconds:g} seconds.") from error
            yield bytes(body)
        finally:
            self.buffered_bytes -= held

    async def chunks_of(self, scope, receive) -> AsyncIterator[bytes]:
        limit = self.settings.max_body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        received = int(declared) if declared.isdecimal() and int(declared) > DRAINED * limit else 0
        more = received == 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            received += len(message.get("body", b""))
            if received <= limit:
                yield message.get("body", b"")
            more = message.get("more_body", False) and received <= DRAINED * limit
        if received > limit:
            raise RequestError(413, f"The body must have at most {limit:,} bytes.")

    async def read(self, name: str, scope, body: bytes) -> ServiceRequest:
        """
        Raises:
            RequestError: 400 or 422 for an invalid body; 415 for a body that is neither JSON nor a form.
        """
        content_type = Headers(scope=scope).get("content-type", "application/json")
        kind = content_type.partition(";")[0].strip().lower()
        content: bytes | dict = body
        if kind == "multipart/form-data":
            content = await self.read_form(self.models[name], scope, body)
        elif kind != "application/json":
            raise RequestError(415, "The Content-Type must be application/json or multipart/form-data.")
        elif body.count(b":") > self.max_colons:
            raise RequestError(422, "The body has too many fields.")
        return await to_thread.run_sync(validate, self.models[name], content, limiter=self.validators)

    async def read_form(self, model: type[ServiceRequest], scope, body: bytes) -> dict:
        """Convert a form to the fields of a JSON body. Lists are repeated fields, images are files."""

        async def receive():
            return {"type": "http.request", "body": body}

        most = self.settings.max_images + self.settings.max_texts + len(model.model_fields)
        try:
            # Without the application, or Starlette answers errors itself.
            request = Request({key: value for key, value in scope.items() if key != "app"}, receive)
            async with request.form(max_files=most, max_fields=most, max_part_size=len(body)) as form:
                values = [
                    (name, await value.read() if isinstance(value, UploadFile) else value)
                    for name, value in form.multi_items()
                ]
        except Exception as error:  # the parsers raise many kinds
            raise RequestError(400, "The body is not a valid form or has too many fields.") from error
        found: dict = {}
        for name, value in values:
            found.setdefault(name, []).append(value)
        lists = {
            name for name, one in model.model_fields.items() if getattr(one.annotation, "__origin__", None) is list
        }
        return {name: value if name in lists or len(value) > 1 else value[0] for name, value in found.items()}

    async def prepare(self, name: str, request: ServiceRequest) -> list[Item]:
        """
        Raises:
            RequestError: An image or a text is invalid.
        """
        engine, seconds = self.get_engine(), self.settings.max_latency_ms / 1000
        engine.num_preparing += 1
        try:
            with fail_after(seconds):
                sources = [await self.bytes_of(source) for source in images_of(request)]

                def look_up() -> tuple[list[Picture], list[dict]]:
                    pictures = [engine.find_image(source, request.schedule) for source in sources]
                    return pictures, engine.prepare_texts(texts_of(request))

                pictures, tokens = await to_thread.run_sync(look_up, limiter=self.validators)
                for position, picture in enumerate(pictures):
                    if picture.image_cache is None:
                        pictures[position] = await to_thread.run_sync(
                            engine.read_image, picture.key, sources[position], limiter=self.decoders
                        )
        except TimeoutError as error:
            raise RequestError(503, f"The images were not decoded within {seconds:g} s. Try again later.") from error
        finally:
            engine.num_preparing -= 1
        return items_of(request, pictures, tokens, in_pairs=name != "features")

    async def bytes_of(self, source: str | bytes) -> bytes:
        if isinstance(source, bytes):
            return source
        if not is_url(source):
            return from_base64(source)
        if not self.settings.allow_urls:
            raise RequestError(422, "URLs are not supported by this service. Send the image itself.")
        return await fetch(source, self.settings.max_body_bytes, self.settings.url_timeout)

    @contextmanager
    def counted(self):
        self.in_progress += 1
        IN_PROGRESS.set(self.in_progress)
        try:
            yield
        finally:
            self.in_progress -= 1
            IN_PROGRESS.set(self.in_progress)
