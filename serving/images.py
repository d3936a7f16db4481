"""The bytes of an image in a request: base64, or behind a URL."""

import base64
import binascii
import ipaddress
import socket
from collections.abc import Callable

import aiohttp

from .errors import RequestError


CHUNK = 1 << 16
# IPv6 networks that carry IPv4 addresses, of which a gateway may make any address of its own network, and the former
# site-local ones. `ipaddress` calls them global.
TRANSLATED_NETWORKS = [
    ipaddress.ip_network(network)
    for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96", "fec0::/10")
]


def is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def from_base64(text: str) -> bytes:
    """Of plain base64, or a data URL of it."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, "An image is neither base64 nor a data URL of it.") from error


def is_public(address: str) -> bool:
    """Whether an IP address is of the open internet; of one that carries another within, whether that is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if inner is not None:
        return is_public(str(inner))
    if ip.version == 6 and any(ip in network for network in TRANSLATED_NETWORKS):
        return False
    return ip.is_global and not ip.is_multicast


async def fetch(url: str, max_bytes: int, timeout: float, is_allowed: Callable[[str], bool] = is_public) -> bytes:
    """
    What is behind a URL. The address is checked where the connection is made: it is the one that the name was resolved
    to, and a redirect goes through the same door.

    Raises:
        RequestError: 422 if the address is not `is_allowed`, or nothing comes in time; 413 if it is more than
            `max_bytes`.
    """

    def connect(address_info) -> socket.socket:
        family, kind, protocol, _, address = address_info
        if not is_allowed(address[0]):
            raise OSError("no public address")
        return socket.socket(family, kind, protocol)

    limit = aiohttp.ClientTimeout(total=timeout)
    try:
        connector = aiohttp.TCPConnector(socket_factory=connect)
        async with aiohttp.ClientSession(connector=connector, timeout=limit, trust_env=False) as session:
            async with session.get(url, max_redirects=3) as response:
                response.raise_for_status()
                data = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK):
                    data += chunk
                    if len(data) > max_bytes:
                        raise RequestError(413, f"What is behind a URL has more than {max_bytes:,} bytes.")
                return bytes(data)
    # What exactly went wrong would tell a stranger about the network behind this service.
    except (TimeoutError, aiohttp.ClientError, ValueError, OSError) as error:
        raise RequestError(
            422, "A URL could not be fetched: it must be that of an image at a public address."
        ) from error
