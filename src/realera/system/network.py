"""Whether a server can be reached at all, asked in a second or two: libraries try for most of a minute.

Standard library only.
"""

from __future__ import annotations

import socket
import threading
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass


def answers(url: str, patience: float) -> bool:
    """Whether a connection to the url's host, or to the proxy before it, opens within `patience` seconds."""
    asked = urlsplit(url)
    proxies = {} if proxy_bypass(asked.hostname or "") else getproxies()
    if proxy := proxies.get(asked.scheme) or proxies.get("all"):
        asked = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    opened = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((asked.hostname or "", _port(asked)), timeout=patience).close()
            opened.set()
        except (OSError, ValueError):  # ValueError: no port, or a host that is no name
            pass

    thread = threading.Thread(target=knock, daemon=True)  # looking a name up has no time limit of its own
    thread.start()
    thread.join(patience)
    return opened.is_set()


def _port(asked: SplitResult) -> int:
    return asked.port or {"http": 80, "socks5": 1080, "socks5h": 1080}.get(asked.scheme, 443)
