"""HTTP server: OpenRLHF's ``/get_reward``, vLLM's ``/classify`` and ``/pooling``, SGLang's
``/v1/embeddings``, and ``/score``.

Needs the extra ``serve`` (fastapi, uvicorn, prometheus-client). Errors are JSON: ``{"error":
"..."}`` with 400 (no JSON), 401 (key), 404, 405, 408 (body too slow), 413 (body too large, or of
too many values), 422 (content), 429 (queue full) or 503 (loading or stopping), the last two with
Retry-After.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

import rmega
from rmega.scoring.bodies import (
    ClassifyAnswer,
    ClassifyRequest,
    EmbeddingAnswer,
    EmbeddingRequest,
    ErrorAnswer,
    PoolingAnswer,
    PoolingRequest,
    Problem,
    RewardAnswer,
    RewardRequest,
    ScoreAnswer,
    ScoreRequest,
)
from rmega.scoring.connections import ConnectionPool
from rmega.scoring.service import RewardService


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
        sock.listen(2048)  # clients that come before uvicorn accepts wait instead of being refused
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
    and connections that are still open are dropped. Returns whether all threads have ended. The
    caller leaves by ``os._exit``: it waits for no thread, and while Python ends a signal that is
    repeated would give the exit code. Raises what the loading of the model raised.
    """

    def stop(*_: Any) -> None:
        server.should_exit = True
        if not service.stopping:
            service.stopping = True
            for seconds, action in (
                (stop_seconds, service.queue.abandon),
                (stop_seconds + 0.5, pool.close_all),
                (stop_seconds + 1.5, lambda: os._exit(1)),  # whatever blocks the process
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
    finished = service.queue.scorer is not None and not service.queue.abandoned
    if service.queue.failure or finished:
        for timer in timers:
            timer.cancel()
    if service.queue.failure:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise service.queue.failure
    if server.force_exit:  # asked twice
        sys.stdout.flush()
        os._exit(1)
    if finished:
        service.close()
    return finished


def make_app(service: RewardService) -> Any:
    """The ASGI application: routes, OpenAPI page, the form of errors, metrics."""
    app = FastAPI(
        title="rmega",
        version=rmega.__version__,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    errors: dict[int | str, Any] = {
        status: {"model": ErrorAnswer, "description": description}
        for status, description in (
            (400, "The body is no JSON"),
            (401, "A key is needed"),
            (413, "The body is too large"),
            (422, "The content is not what is needed"),
            (429, "The queue is full: see Retry-After"),
            (503, "Loading, or stopping: see Retry-After"),
        )
    }
    for path, endpoint, request, answer in (
        ("/get_reward", service.get_reward, RewardRequest, RewardAnswer),
        ("/score", service.score, ScoreRequest, ScoreAnswer),
        ("/classify", service.classify, ClassifyRequest, ClassifyAnswer),
        ("/pooling", service.pooling, PoolingRequest, PoolingAnswer),
        ("/v1/embeddings", service.embeddings, EmbeddingRequest, EmbeddingAnswer),
    ):
        # Bodies are read by the service, which limits them while they arrive; FastAPI would read
        # and parse whatever comes. It is told of them for its page alone.
        content = {"application/json": {"schema": request.model_json_schema()}}
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            responses={200: {"model": answer, "description": "Rewards"}, **errors},
            openapi_extra={"requestBody": {"content": content, "required": True}},
        )
    for path, endpoint in (
        ("/health", service.health),
        ("/info", service.info),
        ("/metrics", service.prometheus),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    known = ", ".join(
        f"{' '.join(sorted(route.methods - {'HEAD'}))} {route.path}"
        for route in app.routes
        if isinstance(route, Route)
    )

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        service.num_refused += 1
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": error.message}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"error": f"{request.method} {request.url.path}: {error.detail}; known are {known}"},
            error.status_code,
            error.headers,
        )

    paths = {route.path for route in app.routes if isinstance(route, Route)}
    return service.metrics.wrap(app, paths)
