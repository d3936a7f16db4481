"""Decoding of image files from strangers, for the service, the app and the index."""

from .isolated import IsolatedDecoder, decode_untrusted


__all__ = ["IsolatedDecoder", "decode_untrusted"]
