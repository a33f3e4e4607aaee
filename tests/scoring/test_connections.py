"""Clients that hold connections, trickle or flood: others are still answered, and SIGTERM still
ends the server. Only addresses of this machine, a bounded number of sockets, a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from rmega.scoring.connections import VALUES_PER_CONVERSATION, ValueCounter, allowed_connections  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.reward_fixture import chat  # noqa: E402
from tests.scoring.test_server import Client  # noqa: E402

# ---- the number of values in a body


def num_values(value) -> int:
    """Values below (and with) this one, names of fields included."""
    if isinstance(value, dict):
        return 1 + sum(1 + num_values(v) for v in value.values())
    return 1 + sum(map(num_values, value)) if isinstance(value, list) else 1


def count(data: bytes, *cuts: int) -> int:
    counter, ends = ValueCounter(), [0, *sorted(cuts), len(data)]
    for start, end in zip(ends, ends[1:], strict=False):
        counter.add(data[start:end])
    return counter.num_values


@pytest.mark.parametrize(
    ("value", "least"),
    [
        ({"query": ["a", 'b"', "c\\", '\\"', "{[,:", "\\\\"]}, 8),
        ([[[]], {}, {"a": {}}, [1, 2.5, None, True]], 11),
        ({"messages": chat('He said: "[1, 2, {}]"', "C:\\dir\\")}, 12),
        ("", 0),
    ],
)
def test_values_are_counted_outside_strings_wherever_the_parts_end(value, least):
    data = json.dumps(value).encode()
    whole = count(data)
    assert least <= whole <= 2 * num_values(value) and whole >= num_values(value) - 2
    for cut in range(len(data)):
        assert count(data, cut) == whole, cut
    assert count(data, *range(len(data))) == whole


def test_values_of_random_bodies():
    rng = random.Random(0)

    def value(depth: int):
        kind = rng.randrange(5 if depth else 2)
        if kind == 3:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 4:
            return {text(): value(depth - 1) for _ in range(rng.randrange(4))}
        return rng.choice([1, -2.5, None, True]) if kind == 0 else text()

    def text() -> str:
        return "".join(rng.choice('\\",:[]{}aé\n') for _ in range(rng.randrange(8)))

    for _ in range(300):
        made = value(4)
        data = json.dumps(made, ensure_ascii=rng.random() < 0.5).encode()
        cuts = [rng.randrange(len(data) + 1) for _ in range(rng.randrange(4))]
        assert count(data, *cuts) == count(data)
        # separators: at least one per value but the first of each container
        assert num_values(made) - 1 <= count(data) + data.count(b"[]") + data.count(b"{}")
        assert count(data) <= 2 * num_values(made)


FLOODS = {
    "queries": (b'{"query": [', b'"a",'),
    "lists": (b'{"conversations": [', b"[],"),
    "conversations": (
        b'{"conversations": [',
        b'[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],',
    ),
    "numbers": (b'{"query": [', b"1,"),
    "fields": (b'{"query": "a"', b',"a":1'),
    "deep": (b'{"query": ', b"["),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_values_is_refused_before_it_is_parsed(name, monkeypatch):
    """31 MiB of tiny values: 413 after the first of them, long before the body's end."""
    from rmega.scoring import service

    head, repeated = FLOODS[name]
    size = 31 * 2**20
    parsed, received = [], []
    monkeypatch.setattr(service, "parse", lambda model, data: parsed.append(data))
    client = Client()
    part = repeated * (65536 // len(repeated))
    body = iter([head, *[part] * (size // len(part))])

    async def receive():
        received.append(next(body))
        return {"type": "http.request", "body": received[-1], "more_body": True}

    answer: dict = {}

    async def send(message):
        answer.update({"status": message.get("status", answer.get("status"))})

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/score",
        "raw_path": b"/score", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    start = time.process_time()
    asyncio.run(client.app(scope, receive, send))
    seconds = time.process_time() - start
    client.service.close()
    assert answer["status"] == 413 and not parsed and client.service.bodies.buffered == 0
    assert sum(map(len, received)) < size and seconds < 1, seconds


def test_a_large_request_of_ordinary_text_is_taken():
    """As many conversations as may be, of many turns with code in them."""
    client = Client(max_conversations=64)
    code = 'def f(x):\n    return {"a": [x, 1], "b": "\\\\"}\n' * 20
    turns = [m for _ in range(20) for m in chat(code, "ok")]
    status, answer, _ = client.ask("/score", {"conversations": [turns] * 64})
    client.service.close()
    assert status == 200 and answer["rewards"] == [2.0] * 64
    assert 64 * 40 * 5 < 64 * VALUES_PER_CONVERSATION


# ---- connections


class Server:
    """The server with a scorer that needs no model, in a process of its own."""

    def __init__(self, *flags: str, model: str = "lengths") -> None:
        argv = ["-m", "tests.scoring.lengths", "--model", model, "--port", "0", *flags]
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.sockets: list[socket.socket] = []
        line = self.process.stdout.readline()
        assert " at http://127.0.0.1:" in line, line + self.process.communicate()[1]
        self.port = int(line.rsplit(":", 1)[1])

    def connect(self, sent: bytes = b"") -> socket.socket:
        self.sockets.append(socket.create_connection(("127.0.0.1", self.port), timeout=30))
        if sent:
            self.sockets[-1].sendall(sent)
        return self.sockets[-1]

    async def ask(self, path: str, body: dict | None = None) -> tuple[int, dict, float]:
        """(status, answer, seconds)."""
        start = time.monotonic()

        async def talk() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request(path, body))
            answer = await reader.read()
            writer.close()
            return answer

        head, _, rest = (await asyncio.wait_for(talk(), 60)).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(rest), time.monotonic() - start

    def stop(self) -> tuple[int, float, str]:
        """(exit code, seconds from SIGTERM to the end, all that it printed)."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, time.monotonic() - start, out + err

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def request(path: str, body: dict | None = None, *, length: int | None = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    )
    return (
        f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data
    )


@pytest.fixture
def start():
    servers: list[Server] = []

    def make(*flags: str, **options) -> Server:
        servers.append(Server(*flags, **options))
        return servers[-1]

    yield make
    for one in servers:
        one.close()


async def ask_many(server: Server, number: int) -> tuple[list, list]:
    """So many requests at once, and /health asked again and again until the last is answered."""
    tasks = [
        asyncio.create_task(server.ask("/get_reward", {"query": ["a" * (1 + i % 50)]}))
        for i in range(number)
    ]
    health = [await server.ask("/health")]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.05)
        health.append(await server.ask("/health"))
    return await asyncio.gather(*tasks), health


def busy() -> float:
    """How many processes wait for each processor: 1 on a machine that does nothing else."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def load_test(server: Server, num_idle: int, num_requests: int) -> None:
    """Idle sockets, half of them with half a header, beside real requests."""
    for i in range(num_idle):
        server.connect(b"" if i % 2 else b"POST /score HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    answers, health = asyncio.run(ask_many(server, num_requests))
    assert [a[0] for a in answers] == [200] * num_requests
    assert [a[1]["rewards"] for a in answers] == [[1.0 + i % 50] for i in range(num_requests)]
    assert {h[0] for h in health} == {200}
    assert max(h[2] for h in health) < 1 * busy(), "/health must answer within a second"
    code, seconds, printed = server.stop()
    assert code == 0 and seconds < 10 and "Traceback" not in printed, printed


def test_idle_sockets_beside_requests(start):
    load_test(start("--max-connections", "150"), num_idle=300, num_requests=100)


@pytest.mark.slow
def test_two_thousand_idle_sockets_beside_a_thousand_requests(start):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 8192:
        pytest.skip("too few open files for so many sockets")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8192), hard))
    try:
        load_test(start(), num_idle=2000, num_requests=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_open_files_are_enough(start):
    """Where the system allows fewer open files than there are silent sockets."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300));"
        "from tests.scoring.lengths import serve; sys.exit(serve(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--model", "m", "--max-connections", "500", "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "--max-connections 500: the limit on open files" in done.stderr
    assert allowed_connections(1) == 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_headers_have_a_time_limit(start):
    server = start("--header-seconds", "0.5")
    silent = server.connect()
    half = server.connect(b"GET /health HTTP/1.1\r\nX: ")
    for _ in range(10):  # a byte now and then does not help
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            half.sendall(b"x")
    half.settimeout(5)
    assert half.recv(1000).startswith(b"HTTP/1.1 408 Request Timeout")
    assert silent.recv(10) == b""
    again = server.connect(request("/health").replace(b"Connection: close\r\n", b""))
    answer = b""
    while not answer.endswith(b"}"):
        answer += again.recv(4000)
    assert answer.startswith(b"HTTP/1.1 200")
    again.sendall(b"GET /health HTTP/1.1\r\nX: ")  # the second request on a connection
    again.settimeout(5)
    assert again.recv(100) == b""


def test_a_new_connection_takes_the_place_of_a_silent_one_never_of_a_request(start):
    server = start("--max-connections", "2", model="stuck")
    working = [server.connect(request("/get_reward", {"query": ["a"]})) for _ in range(2)]
    time.sleep(0.5)  # both requests have arrived
    refused = server.connect()
    assert refused.recv(1000).startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: ")
    working[0].close()
    time.sleep(0.5)
    silent, talking = server.connect(), server.connect()
    talking.sendall(request("/health"))
    assert talking.recv(1000).startswith(b"HTTP/1.1 200")
    with contextlib.suppress(ConnectionResetError):
        assert silent.recv(10) == b""
    working[1].settimeout(0.2)
    with pytest.raises(TimeoutError):
        working[1].recv(10)


@pytest.mark.parametrize("model", ["lengths", "stuck"])
def test_sigterm_ends_it_whatever_clients_do(start, model):
    """Silent sockets, half a header, half a body, and one that asks on and on without reading;
    where the model never answers, the accepted requests get 503."""
    server = start("--stop-seconds", "2", model=model)
    for _ in range(20):
        server.connect()
        server.connect(b"POST /score HTTP/1.1\r\nX: ")
        server.connect(request("/score", {"messages": chat("q", "a")}, length=10_000))
    accepted = server.connect(request("/get_reward", {"query": ["abc"]}))
    deaf = server.connect()
    deaf.settimeout(0.2)
    body = {"query": ["a" * 50] * 1024}
    with contextlib.suppress(OSError):
        for _ in range(50):
            deaf.sendall(request("/get_reward", body).replace(b"Connection: close\r\n", b""))
    time.sleep(0.5)
    code, seconds, printed = server.stop()
    assert code == 0 and seconds < 6, (code, seconds, printed)
    assert "Traceback" not in printed and "stopped after" in printed, printed
    answer = accepted.recv(10_000)
    if model == "lengths":
        assert b" 200 OK" in answer
    else:
        assert b" 503 " in answer and b"stopping" in answer and b"retry-after: 5" in answer
