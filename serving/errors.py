"""Errors of requests."""

from starlette.responses import JSONResponse


class RequestError(Exception):
    """
    Args:
        status (`int`): HTTP status.
        message (`str`): Message for the client, with the remedy.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse({"error": self.message}, self.status, headers)
