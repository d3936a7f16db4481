"""The paths that the service has, and none besides."""

import os

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles


class KnownPaths:
    """
    ASGI application that answers for paths which are none of `app`'s itself: BentoML's metrics begin a series for each
    path that they see, and a stranger could have them fill the memory.

    Args:
        app (`Starlette`)
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
            await JSONResponse({"error": "There is nothing here: / shows what there is."}, 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
