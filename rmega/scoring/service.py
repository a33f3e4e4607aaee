"""What the server does with a request: limits, text to tokens, rewards, the form of the answer."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hmac
import json
import struct
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import rmega
from rmega.preferences.scorable import Conversation
from rmega.scoring.bodies import (
    Classified,
    ClassifyAnswer,
    ClassifyRequest,
    Embedded,
    EmbeddingAnswer,
    EmbeddingRequest,
    EngineAnswer,
    Pooled,
    PoolingAnswer,
    PoolingRequest,
    Problem,
    RewardAnswer,
    RewardRequest,
    ScoreAnswer,
    ScoreRequest,
    Usage,
    conversations_of,
    parse,
)
from rmega.scoring.limits import BodyReader, Limits
from rmega.scoring.metrics import Metrics
from rmega.scoring.queue import Abandoned, ScoringQueue

T = TypeVar("T")
R = TypeVar("R", bound=ClassifyRequest)

MAX_CHARS_PER_TOKEN = 256  # of any text; spares the tokenizer a body full of one word
NO_LIMIT = 2**40  # tokens
ENCODED_AT_ONCE = 32  # conversations, so that a small request does not wait for a large one


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards, lengths in tokens, and whether it was cut, of each conversation of a request."""

    rewards: list[float]
    num_tokens: list[int]
    cut: list[bool]

    @property
    def numbers_cut(self) -> list[int] | None:
        return [i for i, cut in enumerate(self.cut) if cut] or None


class RewardService:
    """Checks requests, turns their text into tokens (in a thread of its own), and waits for the
    rewards."""

    def __init__(
        self,
        queue: ScoringQueue,
        limits: Limits,
        *,
        model: str,
        api_key: str | None = None,
        normalize: tuple[float, float] | None = None,
    ) -> None:
        self.queue, self.limits, self.model, self._api_key = queue, limits, model, api_key
        self.normalize = normalize
        """Mean and standard deviation of rewards: (r - mean) / std is answered; None: r."""
        self.metrics = Metrics(queue)
        self.stopping = False
        """Reported by /health; requests that were accepted before are still answered."""
        self.in_flight = 0
        self.num_requests = self.num_refused = 0
        self.bodies = BodyReader(limits, queue.seconds_to_wait)
        self._encoder = ThreadPoolExecutor(1, "tokens")

    # ---- endpoints

    async def get_reward(self, request: Request) -> Response:
        """OpenRLHF's endpoint: rewards of texts.

        A text is prompt and response with the chat template applied, as a sampler's tokens decode;
        its reward is that of the same conversation at `/score`.
        """
        data = await self._body(request)
        body = await self._in_thread(lambda: parse(RewardRequest, data))
        scored = await self._score(body.query, None, "query[{}]", 0)
        logs = {
            "num_tokens": [float(n) for n in scored.num_tokens],
            "cut": [float(c) for c in scored.cut],
        }
        return _json(RewardAnswer(rewards=scored.rewards, scores=scored.rewards, extra_logs=logs))

    async def score(self, request: Request) -> Response:
        """Rewards of conversations, or of any form of row that tools/score.py takes."""
        data = await self._body(request)
        conversations, tools = await self._in_thread(
            lambda: conversations_of(parse(ScoreRequest, data).root)
        )
        scored = await self._score(conversations, tools, "conversation {}", 1)
        return _json(
            ScoreAnswer(
                rewards=scored.rewards, num_tokens=scored.num_tokens, cut=scored.numbers_cut
            )
        )

    async def classify(self, request: Request) -> Response:
        """vLLM's endpoint of sequence classifiers: the reward is the one value in `probs`."""
        scored, _ = await self._score_input(request, ClassifyRequest)
        rows = [Classified(index=i, probs=[r]) for i, r in enumerate(scored.rewards)]
        return _json(ClassifyAnswer(data=rows, **self._engine_fields(scored)))

    async def pooling(self, request: Request) -> Response:
        """vLLM's endpoint of pooling models: the reward is the one value in `data`."""
        scored, _ = await self._score_input(request, PoolingRequest)
        rows = [Pooled(index=i, data=[r]) for i, r in enumerate(scored.rewards)]
        return _json(PoolingAnswer(data=rows, **self._engine_fields(scored)))

    async def embeddings(self, request: Request) -> Response:
        """SGLang's endpoint of reward models: the reward is the one value in `embedding`."""
        scored, body = await self._score_input(request, EmbeddingRequest)
        vectors: list[list[float] | str] = [[reward] for reward in scored.rewards]
        if body.encoding_format == "base64":
            vectors = [b64encode(struct.pack("<f", r)).decode() for r in scored.rewards]
        rows = [Embedded(index=i, embedding=vector) for i, vector in enumerate(vectors)]
        return _json(EmbeddingAnswer(data=rows, **self._engine_fields(scored)))

    async def health(self, request: Request) -> Response:
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

    async def prometheus(self, request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        self._check_key(request)
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def info(self, request: Request) -> Response:
        """Model, recipe of the tokens, limits, counts."""
        self._check_key(request)
        scorer, queue = self._scorer(), self.queue
        limits = dataclasses.asdict(self.limits) | {"max_length": self._max_length(scorer)}
        return JSONResponse(
            {
                "rmega": rmega.__version__,
                **scorer.describe(),
                "limits": limits,
                "normalize": self.normalize,
                "requests": self.num_requests,
                "refused": self.num_refused,
                "conversations": queue.num_scored,
                "batches": queue.num_batches,
                "tokens": queue.num_tokens,
                "busy_seconds": round(queue.busy_seconds, 3),
            }
        )

    # ---- parts

    async def _score_input(self, request: Request, model: type[R]) -> tuple[Scored, R]:
        data = await self._body(request)

        def read() -> tuple[R, list[Conversation | list[int]]]:
            body = parse(model, data)
            return body, body.conversations()

        body, conversations = await self._in_thread(read)
        return await self._score(conversations, None, "input[{}]", 0), body

    def _engine_fields(self, scored: Scored) -> dict[str, Any]:
        total = sum(scored.num_tokens)
        usage = Usage(prompt_tokens=total, total_tokens=total)
        return {"model": self.model, "usage": usage, "cut": scored.numbers_cut}

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
        """The body of a request that is counted and has its key."""
        self.num_requests += 1
        self._check_key(request)
        self._scorer()
        return await self.bodies.read(request)

    async def _score(
        self,
        conversations: Sequence[Conversation | list[int]],
        tools: list[Any] | None,
        label: str,
        first: int,
    ) -> Scored:
        """Rewards of messages, rendered texts or token ids. ``label`` with a number, counted from
        ``first``, names a conversation in errors."""
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
        except Exception as error:  # of the model: this request fails, the server continues
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise Problem(500, f"scoring failed: {type(error).__name__}") from None
        finally:
            self.in_flight -= count
        if self.normalize is not None:
            mean, std = self.normalize
            rewards = [(r - mean) / std for r in rewards]
        return Scored([float(f"{r:.9g}") for r in rewards], [len(s) for s in sequences], cut)

    def _encode(
        self,
        scorer: Any,
        conversations: Sequence[Conversation | list[int]],
        tools: list[Any] | None,
        names: list[str],
    ) -> tuple[list[list[int]], list[bool]]:
        """(ids, whether cut) of some conversations. Raises `Problem`, which names one."""
        limit = self._max_length(scorer)
        sequences, cut = [], []
        for name, conversation in zip(names, conversations, strict=True):
            notes: list[str] = []
            try:
                if isinstance(conversation, list) and isinstance(conversation[0], int):
                    ids = scorer.complete(conversation)
                else:
                    self._check_size(conversation, tools, limit)
                    longest = limit if self.limits.cut else NO_LIMIT
                    ids = scorer.encode(conversation, tools, notes, max_length=longest)
                if len(ids) > limit:
                    raise ValueError(f"{len(ids):,} tokens, at most {limit:,}")
            except ValueError as error:
                raise Problem(422, f"{name}: {error}") from None
            except RecursionError:
                raise Problem(422, f"{name}: nested too deeply for the chat template") from None
            except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
                # messages with odd further fields
                raise Problem(
                    422, f"{name}: cannot be put into the chat template ({error})"
                ) from None
            sequences.append(ids)
            cut.append(any(note.startswith("cut") for note in notes))
        return sequences, cut

    def _check_size(self, conversation: Conversation, tools: list[Any] | None, limit: int) -> None:
        """ValueError for more characters than ``limit`` tokens can be. All that may reach the
        template counts: tool calls and further fields, too."""
        if not isinstance(conversation, str):
            conversation = json.dumps([conversation, tools or []], ensure_ascii=False)
        if len(conversation) > limit * MAX_CHARS_PER_TOKEN:
            raise ValueError(
                f"{len(conversation):,} characters are too long to be {limit:,} tokens"
            )

    def close(self) -> None:
        """After the last request: end the threads."""
        self._encoder.shutdown()
        self.queue.close()


def _json(answer: ScoreAnswer | RewardAnswer | EngineAnswer) -> Response:
    # exclude_none leaves out ``cut`` where nothing was; other fields are never None
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")
