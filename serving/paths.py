"""Known paths of the service."""

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .errors import RequestError


PAGE_FILES = {"/": "page.html", "/page.js": "page.js"}
# Swagger UI sets inline styles and has icons in data URLs.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: Starlette) -> Starlette:
    """Replace BentoML's page by one without files from other hosts, and return errors of routes as JSON."""

    def page(request: Request) -> FileResponse:
        return FileResponse(Path(__file__).parent / PAGE_FILES[request.url.path], headers=PAGE_HEADERS)

    def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    app.router.routes[:0] = [Route(path, page) for path in PAGE_FILES]
    app.add_exception_handler(HTTPException, refuse)
    return app


class KnownPaths:
    """
    ASGI middleware that rejects unknown paths, because BentoML's metrics start a series per path, which could fill the
    memory. It also rejects a Content-Type that is not ASCII, which breaks BentoML's request log.

    Args:
        app (`Starlette`): Wrapped application.
    """

    def __init__(self, app: Starlette):
        self.app = app
        self.paths = {route.path for route in app.routes if isinstance(route, Route)}
        for route in app.routes:
            if isinstance(route, Mount) and isinstance(route.app, StaticFiles):
                self.paths |= {f"{route.path}/{name}" for name in os.listdir(route.app.directory)}

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] == "http" and scope["path"] not in self.paths:
            await RequestError(404, "Unknown path. The page / lists all endpoints.").response(scope, receive, send)
        elif scope["type"] == "http" and not dict(scope["headers"]).get(b"content-type", b"").isascii():
            await RequestError(415, "The Content-Type must be ASCII.").response(scope, receive, send)
        else:
            await self.app(scope, receive, send)
