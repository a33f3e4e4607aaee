"""HTTP server: OpenRLHF's ``/get_reward`` and a plain ``/score``, with batching and limits.

Needs the extra ``serve`` (fastapi, uvicorn). Errors are JSON: ``{"error": "..."}`` with 400 (no
JSON), 401 (key), 404, 405, 408 (body too slow), 413 (body too large, or of too many values), 422
(content), 429 (queue full) or 503 (loading or stopping), the last two with Retry-After.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hmac
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import rmega
from rmega.preferences.comparison import Rejected
from rmega.preferences.scorable import Conversation, scorable
from rmega.scoring.connections import (
    MIN_VALUES,
    VALUES_PER_CONVERSATION,
    ConnectionPool,
    ValueCounter,
)
from rmega.scoring.queue import Abandoned, ScoringQueue

T = TypeVar("T")

MAX_CHARS_PER_TOKEN = 256  # of any text; spares the tokenizer a body full of one word
MAX_BODIES = 8  # bodies of the largest size that may be arriving at once
ENCODED_AT_ONCE = 32  # conversations, so that a small request does not wait for a large one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes."""

    max_body_bytes: int = 32 * 2**20
    max_conversations: int = 1024
    """Per request."""
    max_length: int | None = None
    """Tokens of a conversation; None: as in training, else the model's positions."""
    cut: bool = False
    """Cut what is longer, as in training, instead of refusing it."""
    max_queue: int = 8192
    """Conversations that are waiting or being scored."""
    body_seconds: float = 60.0
    """Longest time that a body may take to arrive."""


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.message}, self.status, headers)


class RewardService:
    """Checks requests, turns their text into tokens (in a thread of its own), and waits for the
    rewards."""

    def __init__(
        self, queue: ScoringQueue, limits: Limits, *, model: str, api_key: str | None = None
    ) -> None:
        self.queue, self.limits, self.model, self._api_key = queue, limits, model, api_key
        self.stopping = False
        """Said at /health; requests that are here already are still answered."""
        self.in_flight = self.buffered = 0
        self.num_requests = self.num_refused = 0
        self._encoder = ThreadPoolExecutor(1, "tokens")

    # ---- endpoints

    async def get_reward(self, request: Request) -> JSONResponse:
        """OpenRLHF: ``{"query": [text, ...], "prompts": ..., "labels": ...}`` -> rewards, scores,
        extra_logs.

        A text is prompt and response with the chat template applied, as a sampler's tokens decode;
        its reward is that of the same conversation at ``/score``. ``prompts`` and ``labels`` are
        not needed for it.
        """
        data = await self._body(request)
        queries = await self._in_thread(lambda: _queries(_json_object(data)))
        rewards, num_tokens, cut = await self._score(queries, None, "query[{}]", 0)
        logs = {"num_tokens": [float(n) for n in num_tokens], "cut": [float(c) for c in cut]}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": logs})

    async def score(self, request: Request) -> JSONResponse:
        """``{"conversations": [[message, ...], ...]}`` (or any form of row that tools/score.py
        takes) -> rewards."""
        data = await self._body(request)
        conversations, tools = await self._in_thread(lambda: _conversations(_json_object(data)))
        rewards, num_tokens, cut = await self._score(conversations, tools, "conversation {}", 1)
        answer: dict[str, Any] = {"rewards": rewards, "num_tokens": num_tokens}
        if any(cut):
            answer["cut"] = [i for i, c in enumerate(cut) if c]
        return JSONResponse(answer)

    async def health(self, request: Request) -> JSONResponse:
        """200 when requests are taken, 503 before and after; for a load balancer, so without a
        key."""
        status = "stopping" if self.stopping else "ready" if self.queue.scorer else "loading"
        return JSONResponse(
            {
                "status": status,
                "model": self.model,
                "queue": self.in_flight,
                "scored": self.queue.num_scored,
            },
            200 if status == "ready" else 503,
        )

    async def info(self, request: Request) -> JSONResponse:
        """Model, recipe of the tokens, limits, counts."""
        self._check_key(request)
        scorer, queue = self._scorer(), self.queue
        limits = dataclasses.asdict(self.limits) | {"max_length": self._max_length(scorer)}
        return JSONResponse(
            {
                "rmega": rmega.__version__,
                **scorer.describe(),
                "limits": limits,
                "requests": self.num_requests,
                "refused": self.num_refused,
                "conversations": queue.num_scored,
                "batches": queue.num_batches,
                "tokens": queue.num_tokens,
                "busy_seconds": round(queue.busy_seconds, 3),
            }
        )

    # ---- parts

    def _scorer(self) -> Any:
        if self.queue.scorer is None:
            raise Problem(503, "the model is loading", 5)
        return self.queue.scorer

    def _max_length(self, scorer: Any) -> int:
        own = scorer.tokenizer.max_length if scorer.tokenizer else None
        return self.limits.max_length or own or scorer.model.geometry.max_position_embeddings

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        given = request.headers.get("x-api-key") or request.headers.get(
            "authorization", ""
        ).removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self._api_key.encode()):
            raise Problem(401, "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """``function()`` in the thread that makes tokens, so that the event loop stays free."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function)

    async def _body(self, request: Request) -> bytes:
        """The body of a request, read no further than the limits on bytes and JSON values."""
        self.num_requests += 1
        self._check_key(request)
        self._scorer()
        limit = self.limits.max_body_bytes
        too_large = Problem(413, f"the body is larger than {limit:,} bytes")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        data, values = bytearray(), ValueCounter()
        most_values = max(MIN_VALUES, VALUES_PER_CONVERSATION * self.limits.max_conversations)

        async def read() -> None:
            async for part in request.stream():
                data.extend(part)
                self.buffered += len(part)
                if len(data) > limit:
                    raise too_large
                if values.add(part) > most_values:
                    raise Problem(
                        413,
                        f"the body has more than {most_values:,} JSON values; a request may have"
                        f" {self.limits.max_conversations:,} conversations",
                    )
                if self.buffered > MAX_BODIES * limit:
                    raise Problem(
                        503, "too many large requests at once", self.queue.seconds_to_wait()
                    )

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise Problem(
                408, f"the body took longer than {self.limits.body_seconds:g} s"
            ) from None
        except ClientDisconnect:
            raise Problem(400, "the client left") from None
        finally:
            self.buffered -= len(data)
        return bytes(data)

    async def _score(
        self, conversations: list[Conversation], tools: list[Any] | None, label: str, first: int
    ) -> tuple[list[float], list[int], list[bool]]:
        """(rewards, lengths in tokens, whether cut) of each conversation."""
        count = len(conversations)
        if count > self.limits.max_conversations:
            raise Problem(
                422,
                f"{count:,} conversations: at most {self.limits.max_conversations:,} in a request",
            )
        if self.in_flight and self.in_flight + count > self.limits.max_queue:
            raise Problem(
                429,
                f"{self.in_flight:,} conversations are waiting, at most"
                f" {self.limits.max_queue:,} may",
                self.queue.seconds_to_wait(),
            )
        scorer = self._scorer()
        self.in_flight += count
        try:
            sequences: list[list[int]] = []
            cut: list[bool] = []
            for start in range(0, count, ENCODED_AT_ONCE):
                part = conversations[start : start + ENCODED_AT_ONCE]
                names = [label.format(first + start + i) for i in range(len(part))]
                encoded = await self._in_thread(
                    functools.partial(self._encode, scorer, part, tools, names)
                )
                sequences += encoded[0]
                cut += encoded[1]
            rewards = await asyncio.wrap_future(self.queue.submit(sequences))
        except (Problem, asyncio.CancelledError):
            raise
        except Abandoned:
            raise Problem(503, "the server is stopping", 5) from None
        except Exception as error:  # of the model: this request fails, the server goes on
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise Problem(500, f"scoring failed: {type(error).__name__}") from None
        finally:
            self.in_flight -= count
        return [float(f"{r:.9g}") for r in rewards], [len(s) for s in sequences], cut

    def _encode(
        self,
        scorer: Any,
        conversations: list[Conversation],
        tools: list[Any] | None,
        names: list[str],
    ) -> tuple[list[list[int]], list[bool]]:
        limit = self._max_length(scorer)
        sequences, cut = [], []
        for name, conversation in zip(names, conversations, strict=True):
            notes: list[str] = []
            try:  # all that may reach the template counts: tool calls and further fields, too
                size = (
                    len(conversation)
                    if isinstance(conversation, str)
                    else len(json.dumps([conversation, tools or []], ensure_ascii=False))
                )
            except RecursionError:
                raise Problem(422, f"{name}: nested too deeply") from None
            if size > limit * MAX_CHARS_PER_TOKEN:
                raise Problem(
                    422, f"{name}: {size:,} characters are too long to be {limit:,} tokens"
                )
            try:
                ids = scorer.encode(
                    conversation, tools, notes, max_length=limit if self.limits.cut else 2**40
                )
            except ValueError as error:
                raise Problem(422, f"{name}: {error}") from None
            except RecursionError:
                raise Problem(422, f"{name}: nested too deeply for the chat template") from None
            except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
                # messages with odd further fields
                raise Problem(
                    422, f"{name}: cannot be put into the chat template ({error})"
                ) from None
            if len(ids) > limit:
                raise Problem(422, f"{name}: {len(ids):,} tokens, at most {limit:,}")
            sequences.append(ids)
            cut.append(any(note.startswith("cut") for note in notes))
        return sequences, cut

    def close(self) -> None:
        """After the last request: end the threads."""
        self._encoder.shutdown()
        self.queue.close()


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8 (byte {error.start + 1})") from None
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Problem(
            400, f"the body is not JSON: {error}" if data else "no body: JSON is needed"
        ) from None
    if not isinstance(body, dict):
        raise Problem(422, f"a JSON object is needed, not {type(body).__name__}")
    return body


def _queries(body: dict[str, Any]) -> list[str]:
    """The texts of OpenRLHF's request."""
    queries = body.get("query")
    if isinstance(queries, str):
        queries = [queries]
    if not isinstance(queries, list):
        raise Problem(422, 'query: a list of texts is needed, {"query": ["..."]}')
    for i, text in enumerate(queries):
        if not isinstance(text, str) or not text:
            what = "an empty text" if text == "" else f"{type(text).__name__}, no text"
            raise Problem(422, f"query[{i}]: {what}")
    for name in ("prompts", "labels"):
        if isinstance(body.get(name), list) and len(body[name]) != len(queries):
            raise Problem(422, f"{name}: {len(body[name])} for {len(queries)} texts in query")
    return queries


def _conversations(body: dict[str, Any]) -> tuple[list[Conversation], list[Any] | None]:
    """The conversations of a row in any form, and the tools that they share."""
    if body.get("conversations") == []:
        return [], None
    try:
        conversations, _, tools = scorable(body)
    except Rejected as error:
        raise Problem(422, str(error)) from None
    except RecursionError:
        raise Problem(422, "the row is nested too deeply") from None
    return conversations, tools


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ValueError that names the flag where the address or port is not free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}") from None
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)  # who comes before uvicorn accepts waits, is not refused
    except (OSError, OverflowError) as error:
        sock.close()
        raise ValueError(
            f"--host {host} --port {port}: {getattr(error, 'strerror', error)}"
        ) from None
    return sock


def run(
    server: Any,
    service: RewardService,
    sockets: list[socket.socket],
    pool: ConnectionPool,
    *,
    stop_seconds: float,
) -> bool:
    """Load the model and serve (``server`` is uvicorn's) until SIGTERM or SIGINT.

    Requests that were taken have ``stop_seconds`` to be scored; then they are answered with 503,
    and connections that are still open are dropped. Returns whether all threads have ended; the
    caller has to leave by ``os._exit`` where they have not. Raises what the loading of the model
    raised.
    """

    def stop(*_: Any) -> None:
        server.should_exit = True
        if not service.stopping:
            service.stopping = True
            for seconds, action in (
                (stop_seconds, service.queue.abandon),
                (stop_seconds + 0.5, pool.close_all),
                (stop_seconds + 1.5, lambda: os._exit(1)),  # whatever holds the process up
            ):
                timer = threading.Timer(seconds, action)
                timer.daemon = True
                timer.start()
                timers.append(timer)

    # uvicorn puts its own handlers in their place while it runs, and raises the signal again when
    # it has stopped: that one must not end the program with the signal's exit code.
    timers: list[threading.Timer] = []
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    handle_exit = server.handle_exit
    server.handle_exit = lambda *args: (stop(), handle_exit(*args))
    service.queue.start(on_failure=stop)
    server.run(sockets)
    for number, handler in before.items():
        signal.signal(number, handler)
    finished = service.queue.scorer is not None and not service.queue.abandoned
    if service.queue.failure or finished:
        for timer in timers:
            timer.cancel()
    if service.queue.failure:
        raise service.queue.failure
    if server.force_exit:  # asked twice
        sys.stdout.flush()
        os._exit(1)
    if finished:
        service.close()
    return finished


def make_app(service: RewardService) -> FastAPI:
    """The application: routes and the form of errors."""
    app = FastAPI(
        title="rmega", version=rmega.__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_api_route("/get_reward", service.get_reward, methods=["POST"], response_model=None)
    app.add_api_route("/score", service.score, methods=["POST"], response_model=None)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/info", service.info, methods=["GET"], response_model=None)

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        service.num_refused += 1
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        known = "POST /get_reward, POST /score, GET /health, GET /info"
        return JSONResponse(
            {"error": f"{request.method} {request.url.path}: {error.detail}; known are {known}"},
            error.status_code,
            error.headers,
        )

    return app
