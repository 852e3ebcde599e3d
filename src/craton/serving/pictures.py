"""Pictures that a request brings: from a data URL, from base64, or, where the server was told so, from an address.

An address is only fetched after it was resolved, every result was found to be public, and over a connection to one of
these very results, so that a second look-up cannot lead elsewhere; each redirect is checked in the same way.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit

from pydantic import Field

from craton.config import Settings
from craton.errors import FileFormatError
from craton.modalities.image import ImageLimits, Pixels, read_image
from craton.serving.errors import ApiError

if TYPE_CHECKING:
    from craton.serving.conversation import Chat

REDIRECTS: Final = 3
PORTS: Final = {"https": 443, "http": 80}
CHUNK: Final = 1 << 16

_DATA = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.ASCII | re.IGNORECASE)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PicturePolicy(Settings):
    """What a server takes. pixels and side: of one picture, before it is decoded."""

    urls: bool = Field(default=False, description="fetch pictures from addresses that a request names")
    http: bool = Field(default=False, description="fetch them without encryption as well")
    most: int = Field(default=16, ge=1, description="pictures of one request")
    file_bytes: int = Field(default=20 << 20, ge=1024, description="bytes of one picture's file")
    pixels: int = Field(default=1 << 25, ge=1, description="pixels of one picture")
    side: int = Field(default=16_384, ge=1, description="pixels of its longer side")
    seconds: float = Field(default=10.0, gt=0, description="time to fetch one")

    @property
    def limits(self) -> ImageLimits:
        """The same for the decoder."""
        return ImageLimits(file_bytes=self.file_bytes, pixels=self.pixels, side=self.side)


def shows_pictures(chat: Chat) -> bool:
    """Whether some message brings a picture."""
    return any(_is_picture(part) for message in chat.messages for part in _parts(message))


def with_pixels(chat: Chat, policy: PicturePolicy) -> Chat:
    """The same conversation with pixels in the place of every {"type": "image_url", "image_url": {"url": ...}}.

    It may fetch and decode, so it belongs into a thread. Raises ApiError (400) for whatever is wrong with a picture.
    """
    count = sum(_is_picture(part) for message in chat.messages for part in _parts(message))
    if count > policy.most:
        raise _refusal(f"{count} pictures, and at most {policy.most} may be shown at once")
    messages = []
    for message in chat.messages:
        if any(_is_picture(part) for part in _parts(message)):
            parts = [
                {"type": "image", "image": read_url(part["image_url"]["url"], policy)} if _is_picture(part) else part
                for part in _parts(message)
            ]
            message = {**message, "content": parts}
        messages.append(message)
    return replace(chat, messages=messages)


def read_url(url: str, policy: PicturePolicy) -> Pixels:
    """The pixels [H, W, 3] of a data URL, or of an address where the policy allows it. Raises ApiError (400)."""
    return _pixels(_from_data_url(url, policy) if url[:5].lower() == "data:" else fetch(url, policy), policy)


def read_picture(given: str, policy: PicturePolicy) -> Pixels:
    """The same, or the pixels of a picture's file in base64 alone, as many clients of embeddings send it. Raises
    ApiError (400)."""
    return read_url(given, policy) if ":" in given else _pixels(_from_base64(given, policy), policy)


def _pixels(data: bytes, policy: PicturePolicy) -> Pixels:
    try:
        return read_image(data, policy.limits)
    except FileFormatError as error:
        raise _refusal(f"{error.what}{f' ({error.remedy})' if error.remedy else ''}") from None


def _from_data_url(url: str, policy: PicturePolicy) -> bytes:
    match = _DATA.match(url)
    if match is None:
        raise _refusal("a picture's data URL begins with data:image/TYPE;base64,")
    kind = match["type"]
    if kind is None or not kind.lower().startswith("image/"):
        raise _refusal(f"a data URL of type {kind or 'text/plain'} is no picture")
    return _from_base64(url[match.end() :], policy)


def _from_base64(text: str, policy: PicturePolicy) -> bytes:
    if len(text) // 4 * 3 > policy.file_bytes + 2:
        raise _refusal(f"a picture's file may have at most {policy.file_bytes:,} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _refusal("the picture is not base64: send it as data:image/png;base64,...") from None


def fetch(url: str, policy: PicturePolicy) -> bytes:
    """The bytes behind an address, after at most `REDIRECTS` redirects.

    Raises ApiError (400) for an address that may not be fetched, one that does not answer with a file in time, and a
    file that is too large, which is not received to its end.
    """
    if not policy.urls:
        raise _refusal("pictures are not fetched here: send them as data URLs (data:image/png;base64,...)")
    deadline = time.monotonic() + policy.seconds
    for _ in range(REDIRECTS + 1):
        parts, host, port = _checked(url, policy)
        addresses = _addresses(host, port)
        if not all(is_public(address) for address in addresses):
            raise _refusal("the picture's address is not a public one")
        try:
            with _connected(addresses[0], port, host, parts.scheme, deadline) as connection:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"Host": parts.netloc, "Accept": "image/*"})
                response = connection.getresponse()
                if response.status == 200:
                    return _received(response, policy, deadline)
                if response.status not in (301, 302, 303, 307, 308):
                    raise _refusal(f"the picture's address answers with status {response.status}")
                url = urljoin(url, response.headers.get("Location", ""))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refusal(f"the picture could not be fetched: {type(error).__name__}") from None
    raise _refusal(f"the picture's address redirects more than {REDIRECTS} times")


def _received(response: http.client.HTTPResponse, policy: PicturePolicy, deadline: float) -> bytes:
    received = bytearray()
    while chunk := response.read1(CHUNK):
        received += chunk
        if len(received) > policy.file_bytes:
            raise _refusal(f"a picture's file may have at most {policy.file_bytes:,} bytes")
    _left(deadline)  # the end may be that of the time
    return bytes(received)


@contextmanager
def _connected(
    address: str, port: int, host: str, scheme: str, deadline: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection to a checked address, which is shut when the time is over, whatever it waits for then: a server
    that sends a byte now and then does not hold a thread."""
    connected = socket.create_connection((address, port), timeout=_left(deadline))
    handle = connected.dup()  # TLS takes the socket over
    timer = threading.Timer(_left(deadline), _shut, (handle,))
    timer.daemon = True
    timer.start()
    try:
        if scheme == "https":
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = connected
        yield connection
    finally:
        timer.cancel()
        connected.close()
        handle.close()


def _shut(handle: socket.socket) -> None:
    with suppress(OSError):  # it has ended in the same moment
        handle.shutdown(socket.SHUT_RDWR)


def _checked(url: str, policy: PicturePolicy) -> tuple[SplitResult, str, int]:
    allowed = ("https", "http") if policy.http else ("https",)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refusal("the picture's address is malformed") from None
    if parts.scheme not in allowed:
        raise _refusal(f"pictures are fetched by {' and '.join(allowed)} alone")
    if not host or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise _refusal("the picture's address is malformed")
    if parts.username is not None or parts.password is not None:
        raise _refusal("the picture's address holds a name or a password")
    if port not in (None, PORTS[parts.scheme]):
        raise _refusal(f"pictures are fetched from port {PORTS[parts.scheme]} alone")
    return parts, host, PORTS[parts.scheme]


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _refusal("the host of the picture's address is not known") from None
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: no loopback, private, link-local or shared one, no
    multicast, and none that only wraps one of another kind."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed.sixtofour is not None or parsed.teredo is not None or parsed in _NAT64:
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left


def _parts(message: Any) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _refusal(what: str) -> ApiError:
    return ApiError(400, what, param="messages", code="invalid_image")
