"""The demo's page and the small server behind it. Standard library, plus pillow for the images.

A browser on this machine can be made to ask this server by any page it shows: requests whose Host is another name (DNS
rebinding), or that another page has sent (Origin, Sec-Fetch-Site), are refused.
"""

from __future__ import annotations

import base64
import io
import logging
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore, Lock, Timer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from realera.files.plain_data import json_text

log = logging.getLogger("realera")
PAGE = Path(__file__).with_suffix(".html")
LONGEST = 500  # letters of a prompt
DIGITS = 19  # of a seed, which is below 2^63
PATIENCE = 20.0  # seconds that a connection may say nothing
MOST = 32  # connections at once; more wait
TURN = 0.5  # seconds after which a request that waits for the model looks whether its client is still there
HERE = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("", "0.0.0.0", "::")  # hosts that open the server to the whole network
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
"""(prompt, seed) -> {"original": data URI, "erased": data URI, "note": what to say of the prompt, may be missing}."""


class Server(ThreadingHTTPServer):
    """At most `MOST` connections at once."""

    request_queue_size = MOST

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.free = BoundedSemaphore(MOST)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.free.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request of %s ended early", client_address, exc_info=True)


def handler(draw: Draw, about: Mapping[str, str], host: str = HERE[0]) -> type[BaseHTTPRequestHandler]:
    """The page, what it is about, and its images, drawn one pair at a time. host: the address that was typed."""
    busy = Lock()
    page, script = _page()

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

        def handle_one_request(self) -> None:
            """One that is sent letter by letter is cut off too."""
            self.cut = Timer(PATIENCE, self.hang_up)
            self.cut.daemon = True
            self.cut.start()
            try:
                super().handle_one_request()
            finally:
                self.cut.cancel()

        def hang_up(self) -> None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def do_GET(self) -> None:
            self.cut.cancel()
            if not self.is_ours():
                self.tell(403, {"error": "this page answers its own requests only"})
                return
            try:
                address = urlsplit(self.path)
                asked = parse_qs(address.query, max_num_fields=10)
            except ValueError:  # too many fields, or a path that is half an address
                self.tell(400, {"error": "this address cannot be read: give a prompt and a seed, nothing else"})
                return
            if address.path == "/":
                self.answer(200, "text/html; charset=utf-8", page)
            elif address.path == "/page.js":
                self.answer(200, "text/javascript; charset=utf-8", script)
            elif address.path == "/about":
                self.tell(200, about)
            elif address.path == "/draw":
                self.drawn(asked)
            else:
                self.tell(404, {"error": "no such page"})

        def drawn(self, asked: Mapping[str, list[str]]) -> None:
            prompt, seed = asked.get("prompt", [""])[0].strip(), asked.get("seed", ["0"])[0]
            whole = seed.isascii() and seed.isdecimal() and len(seed) <= DIGITS and int(seed) < 2**63
            if not prompt or len(prompt) > LONGEST or "\0" in prompt or not whole:
                self.tell(400, {"error": f"give a prompt of up to {LONGEST} letters and a seed of 0 or more"})
                return
            while not busy.acquire(timeout=TURN):
                if self.is_gone():
                    return
            try:
                if self.is_gone():
                    return
                images = draw(prompt, int(seed))
            except Exception:
                log.exception("the images of %r could not be drawn", prompt)
                self.tell(500, {"error": "the images could not be drawn: the command's own window says why"})
                return
            finally:
                busy.release()
            self.tell(200, images)

        def is_ours(self) -> bool:
            """Whether the request came to this server's own name, and from its own page or from no page."""
            names = {*HERE, host.strip("[]").lower()}
            asked = _host(f"//{self.headers.get('Host') or ''}")
            origin = self.headers.get("Origin")
            port = self.connection.getsockname()[1]
            if host in EVERYWHERE:  # then it has as many names as the machine: its page must be that name's own
                names = {asked[0]} if _is_address(asked[0]) else {*HERE, socket.gethostname().lower()}
            return (
                asked[0] in names
                and asked[1] in (port, None if port == 80 else port)
                and (origin is None or (_host(origin) == asked and origin.startswith("http://")))
                and self.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
            )

        def is_gone(self) -> bool:
            """Whether the client has closed its side: then nobody waits for the images."""
            try:
                readable, _, _ = select.select([self.connection], [], [], 0)
                return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
            except (OSError, ValueError):
                return True

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What the base class says of requests that it cannot read, or whose method has no answer here."""
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
            except OSError:  # the client has gone
                log.debug("a client left before it had its answer")

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

        def version_string(self) -> str:
            return "realera"

    return Handler


def _page() -> tuple[bytes, bytes]:
    """The page without its script, which the page's policy wants apart, and the script."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition("<script>")
    script, _, after = rest.partition("</script>")
    return f'{before}<script src="page.js" defer></script>{after}'.encode(), script.encode()


def _host(address: str) -> tuple[str, int | None]:
    """(name, port) of an address; ("", None) of what is none."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    """Whether it is an IP address: no foreign name, which could be made to mean this machine."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, name)
        except (OSError, ValueError):
            continue
        return True
    return False


def data_uri(pixels: Any) -> str:
    """uint8 (H, W, 3) as a PNG that a page can hold."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
