"""The demo's server answers only its own page on its own host, and closes slow or abandoned connections."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from realera.reporting import demo_page
from realera.reporting.demo_page import Server, handler

Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@contextmanager
def served(draw: Callable[[str, int], dict[str, str]], host: str = "127.0.0.1") -> Iterator[int]:
    with Server(("127.0.0.1", 0), handler(draw, {"title": "t"}, host)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server.server_port
        server.shutdown()


def ask(port: int, path: str = "/about", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def nothing(prompt: str, seed: int) -> dict[str, str]:
    return {"original": "data:,a", "erased": "data:,b"}


def test_only_requests_to_its_own_host_are_answered() -> None:
    with served(nothing) as port:
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
            assert ask(port, Host=host)[0] == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "localhost:1",
            "",
            "127.0.0.1",
            "x:y:z",
            f"127.0.0.1.x:{port}",
        ):
            assert ask(port, Host=host)[0] == 403, host


def test_a_typed_host_is_accepted_and_an_open_server_accepts_ip_addresses() -> None:
    with served(nothing, "studio.lan") as port:
        assert ask(port, Host=f"studio.lan:{port}")[0] == 200
    with served(nothing, "0.0.0.0") as port:
        assert ask(port, Host=f"192.168.0.7:{port}")[0] == 200
        assert ask(port, Host=f"evil.example:{port}")[0] == 403


def test_another_page_cannot_draw() -> None:
    with served(nothing) as port:
        own = f"http://127.0.0.1:{port}"
        path = "/draw?prompt=a&seed=1"
        assert ask(port, path, Origin=own, Sec_Fetch_Site="same-origin")[0] == 200
        for headers in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": f"https://127.0.0.1:{port}"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ):
            assert ask(port, path, **headers)[0] == 403, headers


def test_every_answer_has_security_headers() -> None:
    with served(nothing) as port:
        for status, path in ((200, "/"), (200, "/page.js"), (200, "/about"), (404, "/x"), (400, "/draw")):
            found, headers, body = ask(port, path)
            assert found == status
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
            assert b"<script>" not in body
        assert b'src="page.js"' in ask(port, "/")[2] and b"addEventListener" in ask(port, "/page.js")[2]


@pytest.mark.parametrize(
    "seed", ["9" * 5000, str(2**63), "-1", "1.5", "x", "", "%C2%B2", "1e3", "%D9%A3"], ids=lambda seed: seed[:8]
)
def test_a_seed_is_a_number_of_19_digits_at_most(seed: str) -> None:
    with served(lambda prompt, seed: pytest.fail("drawn")) as port:
        assert ask(port, f"/draw?prompt=a&seed={seed or 'no'}")[0] == 400
        assert ask(port, f"/draw?prompt={'a' * 501}&seed=1")[0] == 400
        assert ask(port, "/draw?prompt=a%00b&seed=1")[0] == 400


@pytest.mark.parametrize("path", ["/draw?prompt=a&seed=1" + "&x=1" * 10, "http://[half", "/?" + "&".join(["x=1"] * 20)])
def test_an_address_that_cannot_be_read_is_answered(path: str) -> None:
    with served(lambda prompt, seed: pytest.fail("drawn")) as port:
        status, _, body = ask(port, path, Host=f"127.0.0.1:{port}")
        assert status == 400 and b"cannot be read" in body


def test_other_methods_and_long_lines_are_refused() -> None:
    with served(nothing) as port:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"):
            assert ask(port, method=method)[0] == 501
        assert ask(port, "/" + "a" * 70_000)[0] == 414
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
            assert b'"error"' in raw.recv(1000)
        assert ask(port)[0] == 200


def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_page, "PATIENCE", 0.3)
    with served(nothing) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(demo_page.MOST)]  # the limit
        slow = idle[0]
        slow.sendall(b"GET / HT")
        began = time.monotonic()
        assert ask(port)[0] == 200
        assert time.monotonic() - began < 5
        for connection in idle:
            connection.close()


def test_nothing_is_drawn_for_a_disconnected_client(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(demo_page, "CHECK_INTERVAL", 0.05)
    drawn: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def draw(prompt: str, seed: int) -> dict[str, str]:
        drawn.append(seed)
        started.set()
        go_on.wait(10)
        return {}

    def leave(seed: int) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(f"GET /draw?prompt=a&seed={seed} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        return connection

    with served(draw) as port:
        first = leave(0)
        assert started.wait(10)
        for seed in range(1, 6):
            leave(seed).close()
        time.sleep(0.3)
        first.close()
        go_on.set()
        assert ask(port, "/draw?prompt=a&seed=9")[0] == 200
    assert drawn == [0, 9]
    assert "Traceback" not in capfd.readouterr().err


def test_a_failure_while_drawing_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    def fail(prompt: str, seed: int) -> dict[str, str]:
        raise RuntimeError("out of memory at /home/me")

    with served(fail) as port:
        status, _, body = ask(port, "/draw?prompt=a&seed=1")
        assert status == 500 and b"/home/me" not in body
        assert ask(port)[0] == 200
