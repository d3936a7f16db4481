"""Images of requests from base64 or URLs."""

import base64
import binascii
import ipaddress
import socket
from collections.abc import Callable

import aiohttp

from .errors import RequestError


CHUNK = 1 << 16
# IPv6 networks that embed IPv4 addresses, and former site-local ones. `ipaddress` treats them as global.
TRANSLATED_NETWORKS = [
    ipaddress.ip_network(network)
    for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96", "fec0::/10")
]


def is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def from_base64(text: str) -> bytes:
    """Decode plain base64 or a data URL."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, "An image must be base64 or a data URL.") from error


def is_public(address: str) -> bool:
    """Return whether an IP address, or the one embedded in it, is public."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if inner is not None:
        return is_public(str(inner))
    if ip.version == 6 and any(ip in network for network in TRANSLATED_NETWORKS):
        return False
    return ip.is_global and not ip.is_multicast


async def fetch(url: str, max_bytes: int, timeout: float, is_allowed: Callable[[str], bool] = is_public) -> bytes:
    """
    Fetch a URL. The resolved address is checked at each connection, including those of redirects.

    Raises:
        RequestError: 422 if the address is not `is_allowed` or does not answer in time; 413 for more than `max_bytes`.
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
                        raise RequestError(413, f"The file at a URL must have at most {max_bytes:,} bytes.")
                return bytes(data)
    # Details would reveal the network of this service.
    except (TimeoutError, aiohttp.ClientError, ValueError, OSError) as error:
        raise RequestError(
            422, "A URL could not be fetched. It must be the URL of an image at a public address."
        ) from error
