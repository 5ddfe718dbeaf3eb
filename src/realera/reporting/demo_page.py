"""The demo's page and its small server: standard library, plus pillow for the images.

Any web page can make a browser on this machine send requests to this server. The server refuses requests with another
Host (DNS rebinding) and requests that come from another page (Origin, Sec-Fetch-Site).
"""

from __future__ import annotations

import base64
import errno
import io
import logging
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore, Lock, Timer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from realera.contracts import UserError
from realera.files.plain_data import json_text

log = logging.getLogger("realera")
PAGE = Path(__file__).with_suffix(".html")
LONGEST = 500  # characters of a prompt
DIGITS = 19  # of a seed, which is below 2^63
PATIENCE = 20.0  # seconds until an unfinished request is cut off
MOST = 32  # concurrent connections; more have to wait
CHECK_INTERVAL = 0.5  # seconds between checks that the client of a waiting request is still connected
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ALL_HOSTS = ("", "0.0.0.0", "::")  # hosts that make the server reachable from the whole network
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Draw = Callable[[str, int], dict[str, str]]
"""(prompt, seed) -> {"original": data URI, "erased": data URI, "note": an optional remark about the prompt}."""


class Server(ThreadingHTTPServer):
    """An HTTP server with at most `MOST` concurrent connections."""

    request_queue_size = MOST

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.free_connections = BoundedSemaphore(MOST)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.free_connections.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.free_connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free_connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request from %s ended early", client_address, exc_info=True)


def handler(draw: Draw, about: Mapping[str, str], host: str = LOCAL_HOSTS[0]) -> type[BaseHTTPRequestHandler]:
    """A request handler for the page, its texts (`about`) and its images, one pair at a time. host: as typed by the
    user."""
    busy = Lock()
    page, script = _page()

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

        def handle_one_request(self) -> None:
            """Also cuts off a request that arrives one byte at a time."""
            self.timer = Timer(PATIENCE, self.hang_up)
            self.timer.daemon = True
            self.timer.start()
            try:
                super().handle_one_request()
            finally:
                self.timer.cancel()

        def hang_up(self) -> None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def do_GET(self) -> None:
            self.timer.cancel()
            if not self.is_ours():
                self.tell(403, {"error": "only requests from the demo's own page are answered"})
                return
            try:
                address = urlsplit(self.path)
                query = parse_qs(address.query, max_num_fields=10)
            except ValueError:  # too many fields, or a malformed address
                self.tell(400, {"error": "this address cannot be read: give only a prompt and a seed"})
                return
            if address.path == "/":
                self.answer(200, "text/html; charset=utf-8", page)
            elif address.path == "/page.js":
                self.answer(200, "text/javascript; charset=utf-8", script)
            elif address.path == "/about":
                self.tell(200, about)
            elif address.path == "/draw":
                self.send_images(query)
            else:
                self.tell(404, {"error": "no such page"})

        def send_images(self, query: Mapping[str, list[str]]) -> None:
            prompt, seed = query.get("prompt", [""])[0].strip(), query.get("seed", ["0"])[0]
            seed_fits = seed.isascii() and seed.isdecimal() and len(seed) <= DIGITS and int(seed) < 2**63
            if not prompt or len(prompt) > LONGEST or "\0" in prompt or not seed_fits:
                self.tell(400, {"error": f"give a prompt of at most {LONGEST} characters and a seed of 0 or more"})
                return
            while not busy.acquire(timeout=CHECK_INTERVAL):
                if self.is_gone():
                    return
            try:
                if self.is_gone():
                    return
                images = draw(prompt, int(seed))
            except Exception:
                log.exception("the images of %r could not be drawn", prompt)
                self.tell(500, {"error": "the images could not be drawn: see the terminal of the demo"})
                return
            finally:
                busy.release()
            self.tell(200, images)

        def is_ours(self) -> bool:
            """Whether the request names this server as its host and comes from its own page or from no page."""
            names = {*LOCAL_HOSTS, host.strip("[]").lower()}
            requested = _host(f"//{self.headers.get('Host') or ''}")
            origin = self.headers.get("Origin")
            port = self.connection.getsockname()[1]
            if host in ALL_HOSTS:  # any IP address may be the machine's; the Origin must still be the same
                names = {requested[0]} if _is_address(requested[0]) else {*LOCAL_HOSTS, socket.gethostname().lower()}
            return (
                requested[0] in names
                and requested[1] in (port, None if port == 80 else port)
                and (origin is None or (_host(origin) == requested and origin.startswith("http://")))
                and self.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
            )

        def is_gone(self) -> bool:
            """Whether the client has closed the connection."""
            try:
                readable, _, _ = select.select([self.connection], [], [], 0)
                return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
            except (OSError, ValueError):
                return True

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """Called by the base class for malformed requests and unsupported methods."""
            self.tell(code, {"error": message or "no such request"})

        def tell(self, status: int, content: Any) -> None:
            self.answer(status, "application/json", json_text(content).encode())

        def answer(self, status: int, kind: str, body: bytes) -> None:
            self.close_connection = True
            try:
                self.send_response(status)
                for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
            except OSError:
                log.debug("a client disconnected before its answer was sent")

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

        def version_string(self) -> str:
            return "realera"

    return Handler


@contextmanager
def address_refusals(host: str, port: int) -> Iterator[None]:
    """Inside this context, an address that cannot be served on is a UserError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"host={host} is not an address of this machine: leave it out, or type host=0.0.0.0 for all addresses."
            ) from error
        raise UserError(f"port {port} cannot be opened ({error.strerror}): type port=0 for a free port.") from error


def free_port(host: str, port: int) -> int:
    """`port`, or any free one if it is 0. Raises UserError if it is taken or `host` is not an address of this
    machine."""
    with address_refusals(host, port), Server((host, port), BaseHTTPRequestHandler) as server:
        return server.server_port


def _page() -> tuple[bytes, bytes]:
    """(the page without its script, the script). The page's security policy forbids inline scripts."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition("<script>")
    script, _, after = rest.partition("</script>")
    return f'{before}<script src="page.js" defer></script>{after}'.encode(), script.encode()


def _host(address: str) -> tuple[str, int | None]:
    """(name, port) of an address; ("", None) if it is malformed."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    """Whether `name` is an IP address. A foreign domain name could be pointed at this machine."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, name)
        except (OSError, ValueError):
            continue
        return True
    return False


def png(pixels: Any) -> bytes:
    """A PNG file of uint8 (H, W, 3) pixels."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


def data_uri(pixels: Any) -> str:
    """A PNG data URI of uint8 (H, W, 3) pixels."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
