"""What a request is refused with."""

from starlette.responses import JSONResponse


class RequestError(Exception):
    """
    Args:
        status (`int`): of HTTP.
        message (`str`): for the client: what of its request is wrong, and what would be right.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse({"error": self.message}, self.status, headers)
