"""The demo's page and the small server behind it. Standard library, plus pillow for the images."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from realera.paths import json_text

log = logging.getLogger("realera")
PAGE = Path(__file__).with_suffix(".html")
LONGEST = 500  # letters of a prompt
Draw = Callable[[str, int], dict[str, str]]
"""(prompt, seed) -> {"original": data URI, "erased": data URI, "note": what to say of the prompt, may be missing}."""


def handler(draw: Draw, about: Mapping[str, str]) -> type[BaseHTTPRequestHandler]:
    """The page, what it is about, and its images, drawn one pair at a time."""
    busy = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if address.path == "/":
                self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif address.path == "/about":
                self.tell(200, about)
            elif address.path == "/draw":
                asked = parse_qs(address.query)
                prompt, seed = asked.get("prompt", [""])[0].strip(), asked.get("seed", ["0"])[0]
                if not prompt or len(prompt) > LONGEST or not seed.isdecimal() or int(seed) >= 2**63:
                    self.tell(400, {"error": f"give a prompt of up to {LONGEST} letters and a seed of 0 or more"})
                    return
                with busy:
                    self.tell(200, draw(prompt, int(seed)))
            else:
                self.tell(404, {"error": "no such page"})

        def tell(self, status: int, content: Any) -> None:
            self.answer(status, "application/json", json_text(content).encode())

        def answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler


def data_uri(pixels: Any) -> str:
    """uint8 (H, W, 3) as a PNG that a page can hold."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
