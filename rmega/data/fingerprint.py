"""Fingerprint of a tokenizer: whether datasets and models have the same token ids.

Chat templates may print today's date; everywhere in rmega they print `TEMPLATE_DATE` instead, so
that the ids of a conversation do not depend on the day.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

PROBES = (
    "The quick brown fox doesn't jump over 12345 lazy dogs.",
    "  two spaces,\ttab\n\n\nnew lines  \n",
    "你好，世界！今天天气很好。",
    "def f(x):\n    return x**2  # α ≤ β",
    "naïve café – „Größe“ 🙂👍🏽 \u200b\u00a0",
    "مرحبا Привет こんにちは 안녕하세요 नमस्ते",
)

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""The day on which every chat template is rendered. Llama 3.2's template falls back to the same day
where its engine gives it no clock."""

_CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(?:format\s*=\s*)?('[^'\\]*'|"[^"\\]*")\s*\)""")
_HAS_CLOCK = re.compile(r"\bstrftime_now\s+is\s+(not\s+)?defined\b")
_DIRECTIVES = [f"%{d}" for d in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"] + ["%-d", "%-m", "%-H", "%-I", "%e"]


def freeze_date(template: str) -> str:
    """The template with `TEMPLATE_DATE` written where it asks for the date (``strftime_now``).

    The same text where it does not ask, so freezing twice is freezing once.
    """

    def written(match: re.Match[str]) -> str:
        quote = match[1][0]
        return quote + TEMPLATE_DATE.strftime(match[1][1:-1]) + quote

    if "strftime_now" not in template or template.startswith("{%- macro strftime_now("):
        return template
    frozen = _CLOCK.sub(written, template)
    frozen = _HAS_CLOCK.sub(lambda match: "false" if match[1] else "true", frozen)
    if "strftime_now" not in frozen:
        return frozen
    # A format that only rendering knows: a macro of the same name replaces the clock.
    chain = "".join(f".replace('{d}', '{TEMPLATE_DATE.strftime(d)}')" for d in _DIRECTIVES)
    return f"{{%- macro strftime_now(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}\n{frozen}"


def frozen_dates(template: str) -> frozenset[str]:
    """What `freeze_date` writes in place of the clock, as far as the formats are constants."""
    return frozenset(TEMPLATE_DATE.strftime(m[1][1:-1]) for m in _CLOCK.finditer(template))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits that name a tokenizer: vocabulary, special tokens, template and
    behavior on probe texts.

    The probes catch a lost normalizer or pre-tokenizer, and a release of transformers that reads
    the files differently. A token that is special for padding alone is left out: no text holds it,
    and an export may have chosen another.
    """
    return _fingerprint(tokenizer, _special_but_for_pad(tokenizer), own_template(tokenizer) or "")


def is_tokenizer_of(tokenizer: Any, manifest: Mapping[str, Any]) -> bool:
    """Whether a dataset was written with this tokenizer, or with one that differs from it in the
    pad token alone.

    Datasets of earlier versions counted the pad token among the special ones, and the template with
    its clock: fingerprints made so, with the tokenizer's pad token or the dataset's own, match too.
    """
    special = _special_but_for_pad(tokenizer)
    pad_id = manifest.get("pad_token_id")
    written = None if pad_id is None else tokenizer.convert_ids_to_tokens(int(pad_id))
    pads = [set(), *({str(pad)} for pad in (tokenizer.pad_token, written) if pad is not None)]
    templates = [own_template(tokenizer) or ""]
    if manifest.get("chat_template") == templates[0]:
        # an export writes down the template that stood in for one that its base did not have
        templates.append("")
    if (dated := given_template(tokenizer)) and dated != templates[0]:
        templates.append(dated)
    return manifest.get("tokenizer_fingerprint") in {
        _fingerprint(tokenizer, special | pad, template) for pad in pads for template in templates
    }


def _special_but_for_pad(tokenizer: Any) -> set[str]:
    """Special tokens, except one whose only role is the pad token."""
    roles = dict(tokenizer.special_tokens_map)
    pad = roles.pop("pad_token", None)
    elsewhere = [
        token
        for value in roles.values()
        for token in (value if isinstance(value, list) else [value])
    ]
    elsewhere += getattr(tokenizer, "extra_special_tokens", None) or []
    return set(map(str, tokenizer.all_special_tokens)) - ({str(pad)} - set(map(str, elsewhere)))


def _fingerprint(tokenizer: Any, special: set[str], template: str) -> str:
    digest = hashlib.sha256()
    for text, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\0{text}\0".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(sorted(special)).encode())
    digest.update(template.encode())
    for probe in PROBES:
        digest.update(
            np.asarray(tokenizer.encode(probe, add_special_tokens=False), np.int64).tobytes()
        )
    return digest.hexdigest()[:16]


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template, its date frozen; None where it has none."""
    template = given_template(tokenizer)
    return None if template is None else freeze_date(template)


def given_template(tokenizer: Any) -> str | None:
    """The template that the tokenizer was given, with its clock; None where it has none.

    Of an export it is that of the training, without the reward token that the export appended.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return without_reward_token(template) if template else None


_NEWLINE = " in place of a newline"
_REWARD_TOKEN = re.compile(
    r"""\{\{ '' if add_generation_prompt else "(?:[^"\\]|\\.)*" \}\}"""
    rf"\{{# reward token of rmega({_NEWLINE})? #\}}\Z"
)


def with_reward_token(template: str, token: str) -> str:
    """The template with the text of the reward token after the last turn, for clients that only
    render it. `without_reward_token` removes it again."""
    mark = "{# reward token of rmega #}"
    if template.endswith("\n"):  # which Jinja drops where nothing follows
        template, mark = template[:-1], f"{{# reward token of rmega{_NEWLINE} #}}"
    return f"{template}{{{{ '' if add_generation_prompt else {json.dumps(token)} }}}}{mark}"


def without_reward_token(template: str) -> str:
    """The template that `with_reward_token` was given; any other as it is."""
    if match := _REWARD_TOKEN.search(template):
        return template[: match.start()] + ("\n" if match[1] else "")
    return template
