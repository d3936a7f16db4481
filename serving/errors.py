"""What a request is refused with."""


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
