"""The server: OpenRLHF's JSON, limits, batching, a thousand requests at once on loopback, and its
end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import b64decode
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from rmega import distributed  # noqa: E402
from rmega.commands.serve import ServeArgs, main  # noqa: E402
from rmega.scoring.limits import Limits  # noqa: E402
from rmega.scoring.queue import ScoringQueue  # noqa: E402
from rmega.scoring.server import make_app  # noqa: E402
from rmega.scoring.service import RewardService  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.reward_fixture import Reference, chat, make_reward_model  # noqa: E402
from tests.scoring.lengths import Lengths  # noqa: E402

NUM_REQUESTS = 1000

# ---- the checks of requests, with a scorer that needs no model


class Client:
    """Calls the application without a network."""

    def __init__(
        self,
        *,
        key: str | None = None,
        load=None,
        wait: float = 0.0,
        max_tokens: int = 1000,
        **limits,
    ):
        self.scorer = Lengths()
        self.queue = ScoringQueue(load or (lambda: self.scorer), max_tokens=max_tokens, wait=wait)
        self.service = RewardService(self.queue, Limits(**limits), model="m", api_key=key)
        self.app = make_app(self.service)
        self.queue.start()
        while load is None and self.queue.scorer is None:
            time.sleep(0.001)

    def ask(self, path: str, body=None, **options):
        return asyncio.run(self.send(path, body, **options))

    async def send(
        self,
        path: str,
        body=None,
        *,
        method: str | None = None,
        headers=(),
        delay: float = 0.0,
        raw: bool = False,
    ):
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        parts = [data[i : i + 50] for i in range(0, len(data), 50)] or [b""]
        parts.reverse()
        answer = {"body": b""}

        async def receive():
            if not parts:
                await asyncio.sleep(60)
            await asyncio.sleep(delay)
            part = parts.pop()
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            if message["type"] == "http.response.start":
                answer.update(status=message["status"], headers=dict(message["headers"]))
            else:
                answer["body"] += message.get("body", b"")

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method or ("GET" if body is None else "POST"),
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, receive, send)
        body = answer["body"] if raw else json.loads(answer["body"])
        return answer["status"], body, answer["headers"]


@pytest.fixture
def client():
    clients = []

    def make(**options) -> Client:
        clients.append(Client(**options))
        return clients[-1]

    yield make
    for one in clients:
        one.scorer.gate.set()
        one.service.close()


def test_get_reward_speaks_openrlhf(client):
    """Fields that OpenRLHF's client posts and reads: openrlhf/utils/agent.py,
    openrlhf/cli/serve_rm.py."""
    body = {"query": ["abc", "defgh"], "prompts": ["a", "d"], "labels": [None, "x"]}
    status, answer, _ = client().ask("/get_reward", body)
    assert status == 200 and answer["rewards"] == answer["scores"] == [3.0, 5.0]
    assert answer["extra_logs"] == {"num_tokens": [3.0, 5.0], "cut": [0.0, 0.0]}
    assert client().ask("/get_reward", {"query": "abc"})[1]["rewards"] == [3.0]
    assert client().ask("/get_reward", {"query": []})[1]["rewards"] == []


def test_score_takes_every_form(client):
    one = client()
    assert one.ask("/score", {"conversations": [chat("q", "abc"), chat("q", "ab")]})[1][
        "rewards"
    ] == [3.0, 2.0]
    assert one.ask("/score", {"messages": chat("q", "abcd")})[1] == {
        "rewards": [4.0],
        "num_tokens": [4],
    }
    assert one.ask("/score", {"prompt": "q", "responses": ["a", "abc"]})[1]["rewards"] == [1.0, 3.0]
    assert one.ask("/score", {"conversations": []})[1]["rewards"] == []


@pytest.mark.parametrize(("path", "field"), [
    ("/classify", "probs"), ("/pooling", "data"), ("/v1/embeddings", "embedding")
])  # fmt: skip
def test_clients_written_for_vllm_and_sglang(client, path, field):
    """Fields that vLLM's own client examples, verl's reward loop and the printed code of an export
    read."""
    one = client()

    def rewards(**body) -> list[list[float]]:
        status, answer, _ = one.ask(path, {"model": "any name", **body})
        assert status == 200, answer
        assert (answer["object"], answer["model"]) == ("list", "m")
        assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
        total = sum(row[field][0] for row in answer["data"])
        assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
        return [row[field] for row in answer["data"]]

    assert rewards(input="abc", use_activation=False) == [[3.0]]
    assert rewards(input=["abc", "ab"], add_special_tokens=False, user="x") == [[3.0], [2.0]]
    assert rewards(input=[5, 6, 7, 8]) == [[4.0]]
    assert rewards(input=[[5, 6], [7]]) == [[2.0], [1.0]]
    assert rewards(input=[]) == []
    assert rewards(messages=chat("q", "abcde")) == [[5.0]]
    if path == "/v1/embeddings":  # what OpenAI's own client asks for
        _, answer, _ = one.ask(path, {"input": [1, 2], "encoding_format": "base64"})
        assert struct.unpack("<f", b64decode(answer["data"][0][field])) == (2.0,)
    if path == "/pooling":
        assert rewards(input=[1, 2], task="classify", encoding_format="float") == [[2.0]]
    answer = one.ask(path, {"input": ["a" * 150, "b"]})[1]  # over the limit of 100
    assert answer["data"][0][field] == [100.0] and answer["cut"] == [0]
    assert "cut" not in one.ask(path, {"input": "b"})[1]


def test_normalized_rewards(client):
    one = client()
    one.service.normalize = (2.0, 4.0)
    assert one.ask("/get_reward", {"query": ["abc", "a"]})[1]["rewards"] == [0.25, -0.25]
    assert one.ask("/score", {"messages": chat("q", "ab")})[1]["rewards"] == [0.0]
    assert one.ask("/classify", {"input": "ab" * 5})[1]["data"][0]["probs"] == [2.0]
    assert one.ask("/info")[1]["normalize"] == [2.0, 4.0]


def test_metrics(client):
    from prometheus_client.parser import text_string_to_metric_families

    one = client(key="k")
    key = [("Authorization", "Bearer k")]
    assert one.ask("/metrics")[0] == 401
    one.ask("/get_reward", {"query": ["abc", "a"]}, headers=key)
    one.ask("/get_reward", {"query": [3]}, headers=key)
    one.ask("/made/up", {}, headers=key)
    status, text, headers = one.ask("/metrics", headers=key, raw=True)
    assert status == 200 and headers[b"content-type"].startswith(b"text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert samples["rmega_requests_total", "/get_reward", "200"] == 1
    assert samples["rmega_requests_total", "/get_reward", "422"] == 1
    assert samples["rmega_requests_total", "other", "404"] == 1
    assert samples["rmega_requests_total", "/metrics", "401"] == 1
    assert samples["rmega_request_seconds_count", "/get_reward"] == 2
    assert samples["rmega_batch_conversations_sum",] == 2
    assert samples["rmega_batch_tokens_sum",] == 4
    assert samples["rmega_batch_seconds_count",] >= 1
    assert samples["rmega_queue_conversations",] == samples["rmega_queue_tokens",] == 0
    assert not any("made" in part for key in samples for part in key)


def test_the_openapi_page(client):
    """Names each endpoint with the fields of its body and answer."""
    one = client(key="k")
    status, page, _ = one.ask("/openapi.json")
    assert status == 200
    posts = {path: item["post"] for path, item in page["paths"].items() if "post" in item}
    fields = {
        path: post["requestBody"]["content"]["application/json"]["schema"].get("properties", {})
        for path, post in posts.items()
    }
    assert set(fields) == {"/get_reward", "/score", "/classify", "/pooling", "/v1/embeddings"}
    assert {"query", "prompts", "labels"} == set(fields["/get_reward"])
    assert {"input", "messages"} < set(fields["/classify"]) < set(fields["/pooling"])
    answers = {p["responses"]["200"]["content"]["application/json"]["schema"]["$ref"] for p in
               posts.values()}  # fmt: skip
    assert all(ref.rpartition("/")[2] in page["components"]["schemas"] for ref in answers)
    assert b"openapi.json" in one.ask("/docs", raw=True)[1]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/get_reward", b"", 400, "no body"),
        ("/get_reward", b'{"query": ["a"', 400, "not JSON"),
        ("/score", b"\xff\xfe{}", 400, "not UTF-8 (byte 1)"),
        ("/score", b"[" * 100_000, 400, "nested too deeply"),
        ("/get_reward", [1], 422, "not list"),
        ("/get_reward", {}, 422, "query: Field required"),
        ("/get_reward", {"query": {"a": 1}}, 422, "query: Input should be a valid array, not dict"),
        (
            "/get_reward",
            {"query": ["a", 3]},
            422,
            "query[1]: Input should be a valid string, not int",
        ),
        ("/get_reward", {"query": [1]}, 422, "query[0]: Input should be a valid string, not int"),
        ("/get_reward", {"query": [[1]]}, 422, "query[0]: Input should be a valid string, not lis"),
        ("/get_reward", {"query": [None]}, 422, "query[0]: Input should be a valid string, not nu"),
        ("/get_reward", {"query": ""}, 422, "query: String should have at least 1 ch"),
        ("/get_reward", {"query": ["a", ""]}, 422, "query[1]: String should have at least 1 ch"),
        ("/get_reward", {"query": ["a"], "max_length": 3}, 422, "max_length: is not supported"),
        ("/get_reward", {"query": ["a"], "normalise": True}, 422, "normalise: is not supported"),
        ("/get_reward", {"query": ["a", "b"], "prompts": ["a"]}, 422, "prompts: 1 for 2"),
        ("/get_reward", {"query": ["a", "b" * 101]}, 422, "query[1]: 101 tokens, at most 100"),
        ("/get_reward", {"query": ["b" * 26_000]}, 422, "query[0]: 26,000 characters"),
        ("/get_reward", {"query": ["a"] * 9}, 422, "at most 8 in a request"),
        ("/score", {"conversation": "x"}, 422, "conversation"),
        ("/score", {"messages": [{"role": "user"}]}, 422, "content"),
        (
            "/score",
            {"messages": chat("q", "a")[:1]},
            422,
            "does not end with a turn of the assistant",
        ),
        ("/score", {"messages": [{"role": "x", "content": "y"}]}, 422, "'x'"),
        ("/score", {"conversations": [chat("q", "a"), "text"]}, 422, "conversation 2"),
        ("/score", {"conversations": 3}, 422, "conversations is int, not a list of messages"),
        *(
            ("/score", {"messages": chat("q", "a"), name: value}, 422, f"{name}: is not supported")
            for name, value in (
                ("normalize", True),
                ("chat_template", "x"),
                ("truncate_prompt_tokens", 3),
                ("use_activation", True),
            )
        ),
        ("/score", {"conversations": [chat("q", "a")], "normalise": 1}, 422, "normalise: is not"),
        ("/score", {"conversations": [], "tokens": 3}, 422, "tokens: is not supported"),
        ("/score", {"conversations": [chat("q", "a")], "tools": 1}, 422, "tools, not a list"),
        ("/score", {"messages": chat("q", "a"), "tools": "x"}, 422, "tools, not a list of tools"),
        ("/score", {"messages": chat("q", "a"), "system": 5}, 422, "system is int, not text"),
        ("/score", {"messages": [{"role": 1, "content": "q"}]}, 422, "1[0]: role is int, not text"),
        (
            "/score",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            422,
            "conversation 1[0]: text of a part is int",
        ),
        ("/score", {"messages": chat("q", "a" * 101)}, 422, "conversation 1: 101 tokens"),
        ("/score", {"messages": chat("q", "a" * 5000)}, 413, "larger than 4,000 bytes"),
        ("/classify", {}, 422, "give one of input and messages"),
        ("/classify", {"input": "a", "messages": chat("q", "a")}, 422, "give one of"),
        ("/classify", {"input": ["a", 3]}, 422, "input[1]: Input should be a valid string"),
        ("/classify", {"input": [[1], [2, "a"]]}, 422, "input[1][1]: Input should be a valid int"),
        ("/classify", {"input": [[1, -2]]}, 422, "input[0][1]: Input should be greater than or"),
        ("/classify", {"input": [[1], []]}, 422, "input[1]: List should have at least 1 item"),
        ("/classify", {"input": [1, "a"]}, 422, "input[1]: Input should be a valid int"),
        ("/classify", {"input": [-1]}, 422, "input[0]: Input should be greater than or"),
        ("/classify", {"input": "a", "max_length": 5}, 422, "max_length: is not supported"),
        ("/classify", {"input": [[1] * 101]}, 422, "input[0]: 101 tokens, at most 100"),
        ("/classify", {"input": "a", "use_activation": True}, 422, "use_activation"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 5}, 422, "truncate_prompt_tokens"),
        ("/classify", {"messages": ["text"]}, 422, "messages[0]: Input should be an object"),
        ("/classify", {"messages": chat("q", "a")[:1]}, 422, "turn of the assistant"),
        ("/pooling", {"input": "a", "task": "token_classify"}, 422, "task"),
        ("/pooling", {"input": "a", "encoding_format": "base64"}, 422, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "dimensions": 2}, 422, "dimensions"),
        ("/nothing", {"query": ["a"]}, 404, "/nothing"),
        ("/health", {}, 405, "Method Not Allowed"),
        ("/score", None, 405, "GET /score"),
    ],
)
def test_bad_requests(client, path, body, status, says):
    limits = {"max_body_bytes": 4000} if status == 413 else {"max_body_bytes": 200_000}
    one = client(max_conversations=8, cut=False, **limits)
    got, answer, _ = one.ask(path, body)
    assert (got, set(answer)) == (status, {"error"}) and says in answer["error"]
    assert one.ask("/score", {"messages": chat("q", "abc")})[1]["rewards"] == [
        3.0
    ]  # and the server continues
    assert one.service.in_flight == one.service.bodies.buffered == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_reward", {"query": ["abc"], "prompts": ["q"], "labels": [None]}),
        ("/score", {"conversations": [chat("q", "abc")], "id": 7}),
        ("/score", {"messages": chat("q", "abc"), "source": "a column", "normalize": False}),
        ("/classify", {"input": "abc", "add_special_tokens": False}),
        ("/pooling", {"messages": chat("q", "abc")}),
        ("/v1/embeddings", {"input": ["abc"]}),
    ],
)
def test_fields_that_change_no_reward_are_accepted(client, path, body):
    """As OpenAI-compatible servers accept them; null stands for an absent field."""
    more = {"model": "m", "user": "u", "request_id": "r", "priority": 0, "metadata": {"a": "b"}}
    one = client()
    status, answer, _ = one.ask(path, {**body, **more, "truncate_prompt_tokens": None})
    assert status == 200 and answer == {**one.ask(path, body)[1], **_of_one_answer(answer)}


def _of_one_answer(answer):
    return {name: answer[name] for name in ("id", "created") if name in answer}


def test_a_body_of_errors_costs_no_more_than_one():
    """One error is reported, so no list of a hundred thousand is made."""
    import tracemalloc

    from rmega.scoring.bodies import ClassifyRequest, Problem, RewardRequest, parse

    for model, body in (
        (RewardRequest, {"query": [None] * 100_000}),
        (ClassifyRequest, {"input": [None] * 100_000}),
        (ClassifyRequest, {"input": [["a"] * 100_000]}),
        (ClassifyRequest, {"messages": [1] * 100_000}),
        (ClassifyRequest, {"x" * 100_000: 1, "input": "a"}),
    ):
        data = json.dumps(body).encode()
        tracemalloc.start()
        with pytest.raises(Problem) as error:
            parse(model, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20 and len(error.value.message) < 200


def test_too_large_by_its_header_is_refused_unread(client):
    status, answer, _ = client(max_body_bytes=100).ask(
        "/score", {}, headers=[("Content-Length", "101")]
    )
    assert status == 413 and "100 bytes" in answer["error"]


def test_a_slow_body_is_given_up(client):
    assert (
        client(body_seconds=0.05).ask("/score", {"messages": chat("q", "a" * 300)}, delay=0.04)[0]
        == 408
    )


def test_cut_is_reported(client):
    one = client(cut=True, max_length=10)
    _, answer, _ = one.ask("/score", {"conversations": [chat("q", "a" * 5), chat("q", "a" * 50)]})
    assert answer == {"rewards": [5.0, 10.0], "num_tokens": [5, 10], "cut": [1]}
    assert one.ask("/get_reward", {"query": ["a" * 50]})[1]["extra_logs"] == {
        "num_tokens": [10.0],
        "cut": [1.0],
    }


def test_a_key(client):
    one = client(key="sesame")
    assert one.ask("/health")[0] == 200
    for headers, status in (
        ((), 401),
        ([("Authorization", "Bearer open")], 401),
        ([("X-API-Key", "sesame")], 200),
        ([("Authorization", "Bearer sesame")], 200),
    ):
        assert one.ask("/get_reward", {"query": ["a"]}, headers=headers)[0] == status
        assert one.ask("/info", headers=headers)[0] == status


def test_while_loading(client):
    gate, made = threading.Event(), Lengths()
    one = client(load=lambda: gate.wait(20) and made)
    assert one.ask("/health")[:2] == (
        503,
        {"status": "loading", "model": "m", "queue": 0, "scored": 0},
    )
    status, answer, headers = one.ask("/score", {"messages": chat("q", "a")})
    assert status == 503 and "loading" in answer["error"] and int(headers[b"retry-after"]) > 0
    gate.set()
    while one.queue.scorer is None:
        time.sleep(0.001)
    assert one.ask("/health")[1]["status"] == "ready"
    assert one.ask("/info")[1]["limits"]["max_length"] == 100


def test_a_full_queue_is_refused_with_a_time_to_wait(client):
    one = client(max_queue=3)
    one.scorer.gate.clear()

    async def burst():
        tasks = [asyncio.create_task(one.send("/get_reward", {"query": ["abc"]})) for _ in range(5)]
        while sum(t.done() for t in tasks) < 2:
            await asyncio.sleep(0.005)
        health = await one.send("/health")
        one.scorer.gate.set()
        return health, await asyncio.gather(*tasks)

    health, answers = asyncio.run(burst())
    assert health[1]["queue"] == 3
    assert sorted(a[0] for a in answers) == [200] * 3 + [429] * 2
    assert all(int(a[2][b"retry-after"]) >= 1 for a in answers if a[0] == 429)
    assert one.ask("/get_reward", {"query": ["abcd"]})[1]["rewards"] == [4.0]


def test_what_the_model_gets_wrong_is_500_and_passes(client, capsys):
    one = client()
    one.scorer.reward = lambda n: float("nan")
    assert one.ask("/get_reward", {"query": ["abc"]})[0] == 500
    one.scorer.reward = lambda n: 1 / 0
    status, answer, _ = one.ask("/get_reward", {"query": ["abc"]})
    assert status == 500 and answer == {"error": "scoring failed: ZeroDivisionError"}
    one.scorer.reward = float
    assert one.ask("/get_reward", {"query": ["abc"]})[1]["rewards"] == [3.0]


@pytest.mark.parametrize("levels", [10, 300, 700, 900, 950, 980])
@pytest.mark.parametrize("where", ["tool_calls", "tools"])
def test_deep_fields_are_the_clients_fault(client, where, levels):
    """As deep as JSON can be read, a template may still not be able to print it: 422, never 500."""
    one = client(max_length=10_000)
    encode = one.scorer.encode
    one.scorer.encode = lambda c, tools, *a, **o: (
        copy.deepcopy([c, tools]) and encode(c, tools, *a, **o)
    )
    messages = chat("q", "abc")
    row = {"messages": messages}
    (row if where == "tools" else messages[1])[where] = "DEEP"
    deep = '{"a": ' * levels + "{}" + "}" * levels
    calls = f'[{{"function": {{"name": "f", "arguments": {deep}}}}}]'
    status, answer, _ = one.ask("/score", json.dumps(row).replace('"DEEP"', calls).encode())
    assert status in ((200,) if levels == 10 else (200, 400, 422)), answer
    assert status == 200 or "deep" in answer["error"]
    assert one.ask("/score", {"messages": chat("q", "abc")})[1]["rewards"] == [3.0]


@pytest.mark.parametrize("field", ["tool_calls", "tools", "more"])
def test_every_field_counts_as_text(client, field):
    """A field that the template may print does not get around the limit on characters."""
    one = client()
    row = {"messages": chat("q", "abc")}
    big = [{"function": {"name": "f", "arguments": "x" * 30_000}}]
    (row if field == "tools" else row["messages"][1])[field] = big
    status, answer, _ = one.ask("/score", row)
    if field == "more" and status == 200:
        return  # a field that no template is given
    assert status == 422 and "characters are too long to be 100 tokens" in answer["error"]


def test_a_server_that_stops_answers_what_it_cannot_score(client):
    one = client()
    one.scorer.gate.clear()

    async def ask_and_stop():
        tasks = [asyncio.create_task(one.send("/get_reward", {"query": ["abc"]})) for _ in range(5)]
        while one.service.in_flight < 5 or not one.scorer.batches:
            await asyncio.sleep(0.005)
        one.queue.abandon()
        return [*await asyncio.gather(*tasks), await one.send("/get_reward", {"query": ["late"]})]

    answers = asyncio.run(ask_and_stop())
    assert [a[0] for a in answers] == [503] * 6 and one.queue.abandoned
    assert all("stopping" in a[1]["error"] and int(a[2][b"retry-after"]) for a in answers)


def test_concurrent_requests_share_batches_and_a_large_one_does_not_block(client):
    one = client(wait=0.05, max_tokens=100)

    async def burst():
        return await asyncio.gather(
            *(one.send("/get_reward", {"query": ["a" * (1 + i % 7)]}) for i in range(60))
        )

    assert [a[1]["rewards"] for a in asyncio.run(burst())] == [[1.0 + i % 7] for i in range(60)]
    assert len(one.scorer.batches) < 12 and max(map(sum, one.scorer.batches)) <= 100
    one.scorer.batches.clear()
    one.scorer.gate.clear()

    async def large_then_small():
        large = asyncio.create_task(one.send("/get_reward", {"query": ["a" * 60] * 20}))
        await asyncio.sleep(0.2)
        one.scorer.gate.set()
        return await asyncio.gather(large, one.send("/get_reward", {"query": ["a" * 99]}))

    answers = asyncio.run(large_then_small())
    assert answers[0][1]["rewards"] == [60.0] * 20 and answers[1][1]["rewards"] == [99.0]
    assert max(map(sum, one.scorer.batches)) <= 100 and len(one.scorer.batches) == 21


def test_close_answers_what_waits(client):
    one = client(wait=5.0)
    futures = [one.queue.submit([[1] * n]) for n in range(1, 6)]
    start = time.monotonic()
    one.queue.close()
    assert [f.result(0) for f in futures] == [
        [float(n)] for n in range(1, 6)
    ] and time.monotonic() - start < 4


# ---- the program


class Server:
    """tools/serve.py in a process of its own, on a free port of the loopback."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "serve.py"), "--port", "0", *flags],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        line = self.process.stdout.readline()
        assert " at http://127.0.0.1:" in line, line + self.process.communicate()[1]
        self.port = int(line.rsplit(":", 1)[1])
        while asyncio.run(self.post("/health", None))[0] != 200:  # an instant after the line
            time.sleep(0.01)

    async def post(self, path: str, body: dict | None, timeout: float = 240.0) -> tuple[int, dict]:
        async def talk():
            for attempt in range(5):
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    break
                except OSError:
                    if attempt == 4:
                        raise
                    await asyncio.sleep(0.2)
            data = b"" if body is None else json.dumps(body).encode()
            lines = [
                f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
                "Host: x",
                "Connection: close",
                f"Content-Length: {len(data)}",
                "",
                "",
            ]
            writer.write("\r\n".join(lines).encode() + data)
            answer = await reader.read()
            writer.close()
            head, _, rest = answer.partition(b"\r\n\r\n")
            return int(head.split()[1]), json.loads(rest)

        return await asyncio.wait_for(talk(), timeout)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def model(small_llama, tmp_path_factory) -> Path:
    return make_reward_model(small_llama, tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(model):
    one = Server("--model", str(model), "--max-queue", "4096", "--stop-seconds", "300")
    yield one
    if one.process.poll() is None:
        one.process.kill()
        one.process.communicate()


def raise_file_limit() -> None:
    with contextlib.suppress(ImportError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 4096:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))


def test_a_thousand_requests_at_once(server, model):
    """Every answer is that of plain transformers, and none is lost."""
    raise_file_limit()
    reference = Reference(model)
    words = "the cat sat on a red mat and saw one big dog run".split()
    bodies, expected, kinds = [], [], {}
    for i in range(NUM_REQUESTS):
        question, answer = (
            f"What is {i % 50}?",
            " ".join(words[(i * k) % len(words)] for k in range(1, 3 + i % 17)),
        )
        conversation = chat(question, answer)
        key = (question, answer)
        if key not in kinds:
            kinds[key] = reference.reward(conversation)
        if i % 2:
            bodies.append(("/score", {"conversations": [conversation]}))
        else:  # as OpenRLHF sends it: templated text; the sampler stopped before the last new line
            bodies.append(
                (
                    "/get_reward",
                    {
                        "query": [reference.text(conversation).rstrip("\n")],
                        "prompts": [question],
                        "labels": [""],
                    },
                )
            )
        expected.append(kinds[key])

    async def all_of_them():
        return await asyncio.gather(*(server.post(*body) for body in bodies))

    start = time.monotonic()
    answers = asyncio.run(all_of_them())
    seconds = time.monotonic() - start
    assert [status for status, _ in answers] == [200] * NUM_REQUESTS
    assert len(set(expected)) > 300
    assert [a["rewards"][0] for _, a in answers] == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert seconds < 120, f"{seconds:.1f} s"


def test_both_endpoints_agree(server, model):
    reference = Reference(model)
    conversation = chat("Who?", "A cat.")

    async def both():
        return await asyncio.gather(
            server.post("/score", {"messages": conversation}),
            server.post("/get_reward", {"query": [reference.text(conversation)]}),
        )

    (_, a), (_, b) = asyncio.run(both())
    assert a["rewards"] == pytest.approx(b["rewards"], rel=1e-5)


def test_sigterm_answers_what_was_taken(server):
    """The last test of the server: requests that are waiting when the signal comes are answered;
    exit code 0, however often the signal is repeated while the program ends."""

    async def burst():
        body = {"query": [f"<s>user: {i}\nassistant: {'word ' * 60}" for i in range(150)]}
        before = (await server.post("/info", None))[1]["requests"]
        tasks = [asyncio.create_task(server.post("/get_reward", body)) for _ in range(8)]
        while (await server.post("/info", None))[1]["requests"] < before + 8:
            pass
        assert not all(t.done() for t in tasks), "nothing is left to be finished"
        server.process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*tasks)

    answers = asyncio.run(burst())
    assert [status for status, _ in answers] == [200] * 8 and all(
        len(a["rewards"]) == 150 for _, a in answers
    )
    while server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    code, out, err = server.stop()
    assert code == 0 and "stopped after" in out, err
    assert "no chat template" in err and "warn" not in err.lower() and "Traceback" not in err, err


def test_texts_over_the_limit_and_normalized_rewards(model, tmp_path):
    """OpenRLHF's client takes an error for a lost sample: also a model whose training dropped what
    is longer answers, with what it did."""
    folder = shutil.copytree(model, tmp_path / "model")
    rows = [
        {"name": name, "step": step, "reward_mean": mean, "reward_std": std}
        for name, step, mean, std in (("a", 0, 9, 9), ("a", 5, 0.5, 2.0), ("b", 5, 7, 7))
    ]
    reward_token = json.loads((folder / "config.json").read_text())["reward_token_id"]
    recipe = {"reward_token_id": reward_token, "max_length": 40, "overlong": "drop"}
    (folder / "reward_recipe.json").write_text(json.dumps({**recipe, "evaluation": rows}))
    one = Server("--model", str(folder), "--normalize", "--stop-seconds", "300")
    conversation = chat("word " * 60, "A cat.")
    try:
        texts = ["<s>user: " + "a b " * 99, "<s>user: a"]
        status, answer = asyncio.run(one.post("/get_reward", {"query": texts}))
        assert status == 200 and answer["extra_logs"]["cut"] == [1.0, 0.0]
        assert answer["extra_logs"]["num_tokens"][0] == 40.0
        status, answer = asyncio.run(one.post("/score", {"messages": conversation}))
        assert status == 200 and answer["cut"] == [0] and answer["num_tokens"][0] <= 40
        status, short = asyncio.run(one.post("/score", {"messages": chat("Who?", "A cat.")}))
    finally:
        code, _, err = one.stop()
    assert code == 0 and "trained with --overlong drop" in err and "normalized" in err, err
    plain = Reference(model).reward(chat("Who?", "A cat."))
    assert short["rewards"] == pytest.approx([(plain - 0.5) / 2.0], rel=1e-4, abs=1e-5)


def test_normalize_needs_the_rewards_of_a_held_out_set(model):
    try:
        with pytest.raises(ValueError, match="--normalize: .* records no spread"):
            main(ServeArgs(model=str(model), port=0, normalize=True))
    finally:
        distributed.finish()


def test_a_port_in_use_is_said_before_the_model_is_read():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use"):
            main(ServeArgs(model="/nowhere/at/all", port=port))


def test_a_model_that_cannot_be_read_ends_the_program():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="--model /nowhere/at/all: no such folder"):
            main(ServeArgs(model="/nowhere/at/all", port=0))
    finally:
        distributed.finish()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 70000}, "--port 70000"),
        ({"max_queue": 0}, "--max-queue 0"),
        ({"host": "no such host"}, "--host no such"),
        ({"api_key_file": "/nowhere"}, "/nowhere"),
    ],
)
def test_flags(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(ServeArgs(model="m", **{"port": 0, **flags}))
