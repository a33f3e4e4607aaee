"""Bodies of the server's requests and answers, as pydantic models (and so in its OpenAPI page)."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    model_validator,
)

from rmega.preferences.comparison import Rejected
from rmega.preferences.scorable import Conversation, scorable

M = TypeVar("M", bound=BaseModel)


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


HARMLESS = frozenset({"model", "user", "request_id", "priority", "metadata", "add_special_tokens"})
"""Fields that clients send to any server, and that change no reward."""

OPTIONS = frozenset(
    "chat_template chat_template_kwargs add_generation_prompt continue_final_message max_length"
    " truncate_prompt_tokens truncation_side use_activation activation softmax normalize dimensions"
    " reward_token".split()
)
"""Fields by which other servers are asked for another reward; here nobody is."""

BESIDE_CONVERSATIONS = HARMLESS | {
    *("conversations", "id", "tools", "functions", "system", "system_prompt")
}
"""Fields of a body with a list of conversations. A row has columns of any name."""


def _listed_text(value: Any) -> Any:
    """One text as a list of one."""
    return [value] if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One text, or the ids of one, as a list of one."""
    ids = isinstance(value, list) and value and _is_id(value[0])
    return [value] if ids else _listed_text(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# fail_fast: one error is reported, so no hundred thousand of them are collected.
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


# ---- requests


class Request(BaseModel):
    """A request whose fields are known. Null stands for an absent field."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name in cls.model_fields or not (value is None or name in HARMLESS)
        }


class RewardRequest(Request):
    """OpenRLHF's request: texts to which the chat template was applied, prompt and response in one.

    ``prompts`` and ``labels`` are not needed for a reward; their number must be that of the texts.
    """

    model_config = ConfigDict(
        json_schema_extra={"example": {"query": ["<s>user: Hi\nassistant: Hello!\n"]}}
    )

    query: Annotated[list[Text], Field(fail_fast=True), BeforeValidator(_listed_text)]
    prompts: Any = None
    labels: Any = None

    @model_validator(mode="after")
    def _same_number(self) -> RewardRequest:
        for name in ("prompts", "labels"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.query):
                raise ValueError(f"{name}: {len(value)} for {len(self.query)} texts in query")
        return self


class ClassifyRequest(Request):
    """vLLM's request for ``/classify``: texts to which the chat template was applied, token ids, or
    the messages of one conversation.

    Fields that change no reward are accepted; any other field is refused.
    """

    model_config = ConfigDict(
        json_schema_extra={"example": {"messages": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
        ]}},
    )  # fmt: skip

    input: Annotated[list[Text | Ids] | None, Field(fail_fast=True), BeforeValidator(_listed)] = (
        None
    )
    messages: Annotated[list[dict[str, Any]] | None, Field(fail_fast=True)] = None
    use_activation: Literal[False] | None = None
    """Rewards are never put through a sigmoid."""
    model: str | None = None
    """Any name: a server has one model."""
    add_special_tokens: bool | None = None
    """Changes nothing: texts get what they had in training."""
    encoding_format: Literal["float"] = "float"
    request_id: str | None = None
    user: str | None = None
    priority: int | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give one of input and messages")
        return self

    def conversations(self) -> list[Conversation | list[int]]:
        """Texts, messages, or token ids. Raises `Problem`."""
        if self.messages is None:
            return list(self.input or [])
        return conversations_of({"messages": self.messages})[0]


class PoolingRequest(ClassifyRequest):
    """vLLM's request for ``/pooling``."""

    task: Literal["classify"] | None = None
    """One number for each conversation; there are no values for single tokens."""


class EmbeddingRequest(ClassifyRequest):
    """OpenAI's request for embeddings, by which SGLang serves reward models."""

    encoding_format: Literal["float", "base64"] = "float"
    """base64: of little-endian fp32, the default of OpenAI's Python client."""


class ScoreRequest(RootModel[dict[str, Any]]):
    """``conversations`` (a list of lists of messages), or any form of row that tools/score.py
    takes: ``messages``, ``prompt`` and ``response``, ``prompt`` and ``responses``, ``text``, or a
    preference schema; and ``tools``, if the conversations use any."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"conversations": [[
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
        ]]}},
    )  # fmt: skip


def parse(model: type[M], data: bytes) -> M:
    """A body as one of the requests. Raises `Problem`, which names the field."""
    if not data:
        raise Problem(400, "no body: JSON is needed")
    try:
        return model.model_validate_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8 (byte {error.start + 1})") from None
    except ValidationError as error:
        raise _problem(error.errors(include_url=False), data) from None


def _problem(errors: list[Any], data: bytes) -> Problem:
    """The first error of the body ``data`` in one line, such as "query[1]: Input should be a valid
    string, not int"."""
    # Of the forms of a value the one that fits best: it fails furthest inside, or not by its type.
    error = max(errors[:9], key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    message, kind = str(error.get("ctx", {}).get("error", error["msg"])), error["type"]
    if kind == "json_invalid":
        deep = "recursion limit" in message
        message = "nested too deeply" if deep else f"not JSON: {message}"
        return Problem(400, f"the body is {message}")
    if kind == "value_error":
        return Problem(422, message)
    if kind == "extra_forbidden":
        message = "is not supported"
    if kind.endswith("_type"):
        message += f", not {_name_of_type(error['input'])}"
    field, *places = error["loc"] or ["the body"]
    numbers = [i for i in places if isinstance(i, int)]  # the others are names of forms
    if numbers:
        value = json.loads(data)[field]
        if isinstance(value, str) or (len(numbers) > 1 and _listed(value) is not value):
            del numbers[0]  # of the list that was made around the value
    return Problem(422, f"{str(field)[:80]}{''.join(f'[{i}]' for i in numbers)}: {message}")


def _name_of_type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def conversations_of(row: dict[str, Any]) -> tuple[list[Any], list[Any] | None]:
    """The conversations of a row in any form, and the tools that they share. Raises `Problem`."""
    _check_fields(row)
    if row.get("conversations") == []:
        return [], None
    try:
        conversations, _, tools = scorable(row)
    except Rejected as error:
        raise Problem(422, str(error)) from None
    except RecursionError:
        raise Problem(422, "the row is nested too deeply") from None
    return conversations, tools


def _check_fields(row: dict[str, Any]) -> None:
    """Raise `Problem` at a field that asks for another reward, or that nobody would read."""
    given = row.get("conversations")
    several = isinstance(given, list) and all(isinstance(one, list) for one in given)
    for name, value in row.items():
        if value is None or (value is False and name in OPTIONS):
            continue
        if name in OPTIONS or (several and name not in BESIDE_CONVERSATIONS):
            raise Problem(422, f"{name[:80]}: is not supported")
    for name in ("system", "system_prompt"):
        if not isinstance(row.get(name) or "", str):
            raise Problem(422, f"{name} is {_name_of_type(row[name])}, not text")


# ---- answers


class RewardAnswer(BaseModel):
    rewards: list[float]
    scores: list[float]
    """The same numbers."""
    extra_logs: dict[str, list[float]]
    """num_tokens and cut (1: longer than the limit, and cut as in training) of each text."""


class ScoreAnswer(BaseModel):
    rewards: list[float]
    num_tokens: list[int]
    cut: list[int] | None = None
    """Numbers (from 0) of conversations that were cut; absent where none was."""


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Classified(BaseModel):
    index: int
    label: str = "reward"
    probs: list[float]
    """The reward, and nothing else."""
    num_classes: int = 1


class Pooled(BaseModel):
    index: int
    object: str = "pooling"
    data: list[float]
    """The reward, and nothing else."""


class Embedded(BaseModel):
    index: int
    object: str = "embedding"
    embedding: list[float] | str
    """The reward, and nothing else; text where base64 was asked for."""


class EngineAnswer(BaseModel):
    """The form of an answer of vLLM and SGLang."""

    id: str = Field(default_factory=lambda: f"rmega-{uuid.uuid4().hex}")
    object: str = "list"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    usage: Usage
    cut: list[int] | None = None
    """As in an answer of ``/score``."""


class ClassifyAnswer(EngineAnswer):
    data: list[Classified]


class PoolingAnswer(EngineAnswer):
    data: list[Pooled]


class EmbeddingAnswer(EngineAnswer):
    data: list[Embedded]


class ErrorAnswer(BaseModel):
    error: str
