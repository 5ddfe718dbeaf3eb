"""Whether a server answers, with and without a proxy."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from realera.system.network import answers

NOBODY = "127.0.0.1:9"  # discard: nobody listens


@pytest.fixture
def listening_address() -> Iterator[str]:
    """The address of a listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("proxy", ["{}", "http://{}", "http://user:word@{}"])
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_is_contacted_in_place_of_the_server(
    name: str, proxy: str, listening_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, proxy.format(listening_address))
    assert answers(f"https://{NOBODY}", 1.0)
    monkeypatch.setenv(name, proxy.format(NOBODY))
    assert not answers(f"https://{listening_address}", 1.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert answers(f"https://{listening_address}", 1.0)


@pytest.mark.parametrize("url", [f"http://{NOBODY}", "http://127.0.0.1:abc", "http://no.such.host.invalid", "nonsense"])
def test_unreachable_servers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    assert not answers(url, 1.0)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:abc")
    assert not answers("http://127.0.0.1", 1.0)
    assert time.monotonic() - began < 5
