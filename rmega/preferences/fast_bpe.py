"""Exact fast path of BPE tokenizers: cut the text where no token can cross, look the pieces up.

Byte-pair merges never cross certain borders: a special token; in a byte-level tokenizer what its
pre-tokenizer cuts apart; in a sentencepiece-like one (whole text, no pre-tokenizer) any two
adjacent characters that are adjacent in no token of the vocabulary. Text cut only at such
borders gives exactly the ids of the whole text, and its pieces repeat, so most are found in a
table. What is not known to be safe is encoded whole by the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable
from typing import Any

MAX_WORDS = 1 << 20
"""Size of the table; it is emptied when full."""

_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2 = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_ASCII = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_PATTERNS = {
    _LLAMA3: re.compile(_LLAMA3_ASCII),  # Qwen 2 differs in digits
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): re.compile(
        _LLAMA3_ASCII.replace("[0-9]{1,3}", "[0-9]")
    ),
}
"""Pre-tokenizer of the tokenizer -> the same for text of ASCII alone, in Python's engine."""

_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u2064"
    "\u3000\ufeff]"
)
"""Characters that not all regex engines count as white space: text with one of them is encoded
whole."""
_ENDINGS = ".,!?:;\"')"
_DIGIT = re.compile(r"([0-9])")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_BEFORE_SPACE = re.compile(r"\s*\S+|\s+")
_SINGLE_SPACE = re.compile(r"\s*\S+(?:(?! \S)\s+\S*)*|\s+")


class _Table(dict[str, bytes]):
    """piece -> its ids as int32 bytes, filled on demand."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, piece: str) -> bytes:
        ids = self._encode(piece)
        if len(self) >= MAX_WORDS:
            self.clear()
        self[piece] = ids
        return ids


class WordEncoder:
    """Encodes text like ``backend.encode(text, add_special_tokens=False)``, several times
    faster."""

    def __init__(
        self,
        backend: Any,
        specials: dict[str, int],
        words: Callable[[str], list[str]],
        encode_word: Callable[[str], bytes],
        odd: re.Pattern[str] | None,
        prefix: str = "",
    ) -> None:
        """``words`` cuts text into words with the white space before them; ``odd`` finds text to be
        encoded whole; ``prefix`` goes before each segment."""
        self._backend, self._words, self._odd, self._prefix = backend, words, odd, prefix
        self._table = _Table(encode_word)
        self._after_space = _Table(lambda word: encode_word(" " + word.replace("\1", " ")))
        self._specials = {text: array("i", [i]).tobytes() for text, i in specials.items()}
        ordered = sorted(specials, key=lambda t: (-len(t), t))
        self._split = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None

    def segments(self, text: str) -> list[str]:
        """The text cut at added tokens: ordinary text at even places, added tokens at odd ones."""
        return [text] if self._split is None else self._split.split(text)

    def encode(self, text: str, known: dict[str, bytes] | None = None) -> bytes:
        """int32 ids as bytes. ``known`` remembers segments, for texts that share some."""
        parts = []
        known = {} if known is None else known
        for number, segment in enumerate(self.segments(text)):
            if number % 2:
                parts.append(self._specials[segment])
            elif segment:
                ids = known.get(segment)
                if ids is None:
                    ids = known[segment] = self._encode_segment(segment)
                parts.append(ids)
        return b"".join(parts)

    def _encode_segment(self, segment: str) -> bytes:
        if self._odd is not None and self._odd.search(segment):
            return self.encode_whole(segment)
        segment = self._prefix + segment
        if (
            "   " in segment
            or "\n " in segment
            or "\t " in segment
            or "\r " in segment
            or "▁" in segment
            or "\1" in segment
        ):
            table = self._table
            return b"".join([table[w] for w in self._words(segment)])
        # One space before each word, or two: splitting at the single space is the fastest cut there
        # is.
        head, *rest = segment.replace("  ", " \1").split(" ")
        return (self._table[head] if head else b"") + b"".join(
            map(self._after_space.__getitem__, rest)
        )

    def encode_whole(self, text: str) -> bytes:
        """The tokenizer's own ids of the whole text, as int32 bytes."""
        return array("i", self._backend.encode(text, add_special_tokens=False).ids).tobytes()


def make_word_encoder(tokenizer: Any, probes: tuple[str, ...]) -> WordEncoder | None:
    """The fast encoder of a transformers tokenizer, or None where none is known to be exact.

    ``probes`` are texts on which it must equal the tokenizer, whatever the analysis finds.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    added = backend.get_added_tokens_decoder()
    normalizer, pre = _state(backend.normalizer), _state(backend.pre_tokenizer)
    if any(
        t.lstrip
        or t.rstrip
        or t.single_word
        or not t.content
        or (t.normalized and normalizer is not None)
        for t in added.values()
    ):
        return None
    if backend.model.dropout:
        return None
    specials = {t.content: i for i, t in added.items()}
    encoder = None
    if normalizer is None and pre is not None:
        encoder = _byte_level(backend, specials, pre)
    elif pre is None:
        encoder = _sentencepiece(backend, specials, normalizer)
    if encoder is None or any(encoder.encode(p) != encoder.encode_whole(p) for p in probes):
        return None
    return encoder


def _state(component: Any) -> dict[str, Any] | None:
    return None if component is None else json.loads(component.__getstate__())


def _byte_level(backend: Any, specials: dict[str, int], pre: dict[str, Any]) -> WordEncoder | None:
    """GPT-2's pre-tokenizer (also after one that isolates digits) and those of Llama 3 and Qwen
    2."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    digits = steps[:-1] == [_DIGITS]
    if last["use_regex"] and (digits or len(steps) == 1):
        words, inner = _BEFORE_SPACE, _GPT2
    elif (
        not last["use_regex"]
        and len(steps) == 2
        and steps[0]["type"] == "Split"
        and not steps[0]["invert"]
        and steps[0]["behavior"] == "Isolated"
        and steps[0]["pattern"].get("Regex") in _SPLIT_PATTERNS
    ):
        words, inner = _SINGLE_SPACE, _SPLIT_PATTERNS[steps[0]["pattern"]["Regex"]]
    else:
        return None
    model = backend.model
    table = _Table(
        lambda token: array(
            "i", [t.id for t in model.tokenize(token.translate(_BYTE_CHARS))]
        ).tobytes()
    )

    def encode_word(piece: str) -> bytes:
        if not piece.isascii():  # what counts as a letter is up to the tokenizer
            return array("i", backend.encode(piece, add_special_tokens=False).ids).tobytes()
        parts = [p for p in _DIGIT.split(piece) if p] if digits else [piece]
        return b"".join([table[token] for part in parts for token in inner.findall(part)])

    return WordEncoder(backend, specials, words.findall, encode_word, _ODD)


def _byte_chars() -> dict[int, str]:
    """Byte-level tokenizers write each byte as a printable character; here for the bytes of
    ASCII."""
    unprintable = [
        b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)
    ]
    return {b: chr(256 + n) for n, b in enumerate(unprintable) if b < 128}


_BYTE_CHARS = _byte_chars()


def _sentencepiece(
    backend: Any, specials: dict[str, int], normalizer: dict[str, Any] | None
) -> WordEncoder | None:
    """Byte-pair encoding of the whole text, with "▁" for a space and no pre-tokenizer."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if steps not in ([_SPACE], [_PREPEND, _SPACE]):
        return None
    prefix = " " if len(steps) == 2 else ""
    tokens = [t for t in backend.get_vocab(False) if not _BYTE_TOKEN.fullmatch(t)]
    beside = {pair for token in tokens for pair in zip(token, token[1:], strict=False)}
    joins = "".join(map(re.escape, sorted({a for a, b in beside if b == "▁"} | {"▁"})))
    again = f"(?:(?<=[{joins}]) +[^ ]*)*"
    words = re.compile(
        f" +[^ ]*{again}|[^ ]+{again}"
    ).findall  # up to a space that follows that character in no token
    model = backend.model
    table = _Table(lambda piece: array("i", [t.id for t in model.tokenize(piece)]).tobytes())

    def encode_word(word: str) -> bytes:
        word = word.replace(" ", "▁")
        stem = word.rstrip(_ENDINGS)
        if stem[1:].isalpha() and stem[1:].isascii():
            if stem == word:
                return table[word]
            if (
                stem[-1],
                word[len(stem)],
            ) not in beside:  # most new words: a known one and a period
                return table[stem] + table[word[len(stem) :]]
        borders = [
            i for i, pair in enumerate(zip(word, word[1:], strict=False), 1) if pair not in beside
        ]
        if not borders:
            return table[word]
        return b"".join(
            [table[word[i:j]] for i, j in zip([0, *borders], [*borders, len(word)], strict=True)]
        )

    if not {a for a, b in beside if b == "▁"} <= set("▁\n\t\r"):
        return None  # a token has a space after a visible character
    return WordEncoder(backend, specials, words, encode_word, None, prefix)
