"""Checks in a second or two whether a server can be reached. Libraries would try for most of a minute.

Standard library only.
"""

from __future__ import annotations

import socket
import threading
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass


def answers(url: str, patience: float) -> bool:
    """Whether a connection to the url's host, or to its proxy, opens within `patience` seconds."""
    server = urlsplit(url)
    proxies = {} if proxy_bypass(server.hostname or "") else getproxies()
    if proxy := proxies.get(server.scheme) or proxies.get("all"):
        server = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((server.hostname or "", _port(server)), timeout=patience).close()
            opened.set()
        except (OSError, ValueError):  # ValueError: an invalid port or host name
            pass

    thread = threading.Thread(target=connect, daemon=True)  # a thread, because a DNS lookup has no time limit
    thread.start()
    thread.join(patience)
    return opened.is_set()


def _port(server: SplitResult) -> int:
    return server.port or {"http": 80, "socks5": 1080, "socks5h": 1080}.get(server.scheme, 443)
