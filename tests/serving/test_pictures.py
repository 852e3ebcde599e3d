"""Pictures in requests: data URLs, Anthropic's blocks, and addresses that are checked before they are fetched."""

from __future__ import annotations

import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.modalities.image import encode_png
from craton.serving import pictures
from craton.serving.conversation import Chat
from craton.serving.errors import ApiError
from craton.serving.pictures import PicturePolicy, fetch, is_public, read_picture, read_url, with_pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PNG = encode_png(PIXELS)
POLICY = PicturePolicy()
OPEN = PicturePolicy(urls=True, http=True, file_bytes=100_000, seconds=2.0)


def data_url(data: bytes = PNG, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat(*urls: str) -> Chat:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return Chat([{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], {})


def test_a_data_url_becomes_pixels():
    read = with_pixels(chat(data_url()), POLICY).messages[0]["content"]
    assert read[0]["type"] == "image"
    assert np.array_equal(read[0]["image"], PIXELS)
    assert read[1] == {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,%%%", "not base64"),
        ("data:image/png;base64,QUJD\n", "not base64"),
        ("data:image/png,QUJD", "base64,"),
        ("data:text/plain;base64,QUJD", "no picture"),
        ("data:;base64,QUJD", "no picture"),
        (data_url(b"text"), "not a picture"),
        (data_url(PNG[:200]), "damaged"),
        ("https://example.com/a.png", "not fetched here"),
        ("file:///etc/passwd", "not fetched here"),
        ("", "not fetched here"),
    ],
)
def test_what_is_no_picture_is_refused(url, said):
    with pytest.raises(ApiError, match=said) as raised:
        read_url(url, POLICY)
    assert (raised.value.status, raised.value.param) == (400, "messages")


def test_a_file_in_base64_alone_is_read_where_a_client_may_send_it():
    file = base64.b64encode(PNG).decode()
    assert np.array_equal(read_picture(file, POLICY), PIXELS)
    assert np.array_equal(read_picture(data_url(), POLICY), PIXELS)
    for given_, said in (("cat.png", "not base64"), (file + "\n", "not base64"), ("QUJD", "not a picture")):
        with pytest.raises(ApiError, match=said):
            read_picture(given_, POLICY)
    with pytest.raises(ApiError, match="not fetched here"):
        read_url(file, POLICY)


def test_limits():
    with pytest.raises(ApiError, match="bytes"):
        read_picture(base64.b64encode(PNG).decode(), PicturePolicy(file_bytes=1024))
    with pytest.raises(ApiError, match="bytes"):
        read_url(data_url(), PicturePolicy(file_bytes=1024))
    with pytest.raises(ApiError, match="30 x 20 pixels"):
        read_url(data_url(), PicturePolicy(pixels=599))
    with pytest.raises(ApiError, match="at most 2"):
        with_pixels(chat(*[data_url()] * 3), PicturePolicy(most=2))


@given(st.text(max_size=60))
def test_any_text_is_refused_or_read(rest):
    for url in (rest, "data:" + rest, "data:image/png;base64," + rest, "https://" + rest, "http://" + rest):
        for read in (read_url, read_picture):
            with pytest.raises(ApiError):
                read(url, POLICY)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
     "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:db8::1", "nonsense"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_public_addresses():
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert is_public("::ffff:93.184.216.34")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://127.0.0.1/a.png", "not a public one"),
        ("https://[::1]/a.png", "not a public one"),
        ("https://2130706433/a.png", "not a public one|not known"),
        ("https://localhost/a.png", "not a public one"),
        ("http://example.com/a.png", "https alone"),
        ("ftp://example.com/a.png", "https alone"),
        ("https://user:pw@example.com/a.png", "name or a password"),
        ("https://example.com:8443/a.png", "port 443"),
        ("https://example.com:99999/a.png", "malformed"),
        ("https:///a.png", "malformed"),
        ("https://exa mple.com/", "malformed"),
        ("https://example.com/a\r\nX: y", "malformed|name"),
        ("https://[::1/a.png", "malformed"),
    ],
)
def test_addresses_that_are_never_asked(url, said, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it was asked"))
    with pytest.raises(ApiError, match=said):
        fetch(url, PicturePolicy(urls=True))


class _Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, _, number = self.path[1:].partition("?")[0].partition("/")
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/redirect/{int(number) - 1}" if int(number) > 1 else "/picture")
            self.end_headers()
            return
        if kind == "inside":
            self.send_response(302)
            self.send_header("Location", "http://10.0.0.1/picture")
            self.end_headers()
            return
        self.send_response(404 if kind == "missing" else 200)
        self.end_headers()
        if kind == "picture":
            self.wfile.write(PNG)
        while kind in ("large", "slow"):
            try:
                self.wfile.write(b"x" if kind == "slow" else b"x" * 10_000)
                self.wfile.flush()
            except OSError:
                return
            if kind == "slow":
                time.sleep(0.1)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    """A site on loopback that passes for a public one, by http at its own port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pictures, "PORTS", {"https": 443, "http": server.server_port})
    monkeypatch.setattr(pictures, "is_public", lambda address: address == "127.0.0.1")
    yield "http://127.0.0.1/"
    server.shutdown()


def test_a_picture_is_fetched_and_redirects_are_followed(site):
    assert fetch(site + "picture", OPEN) == PNG
    assert fetch(site + "redirect/3", OPEN) == PNG
    assert np.array_equal(read_url(site + "picture?size=1", OPEN), PIXELS)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("redirect/4", "more than 3 times"),
        ("inside", "not a public one"),
        ("missing", "status 404"),
        ("large", "at most 100,000 bytes"),
    ],
)
def test_what_a_site_may_not_do(site, path, said):
    with pytest.raises(ApiError, match=said):
        fetch(site + path, OPEN)


def test_a_site_that_is_slow_holds_nobody(site):
    started = time.monotonic()
    with pytest.raises(ApiError, match="could not be fetched"):
        fetch(site + "slow", OPEN.model_copy(update={"seconds": 0.5}))
    assert time.monotonic() - started < 3
