"""Text that a chat template has already rendered -> its conversation.

Clients render conversations themselves: samplers stop before the last white space, padding is
decoded with the text, a second beginning-of-text token is added, today's date is printed. None of
this may change the reward that the messages have, so the turns are recovered where the template's
own frame shows them; every change is noted.
"""

from __future__ import annotations

import re
from typing import Any

from rmega.preferences.chat_template import ChatTemplate, Frame
from rmega.preferences.comparison import Message, assistant, user

PADDING = "padding left out of the text"
DOUBLED = "a second beginning-of-text token left out"
NO_BEGINNING = "the beginning-of-text token put back"
DATED = "the date in the text replaced by that of the training"
RENDERED_AGAIN = "the chat template renders the turns of the text otherwise: its rendering counts"
OPEN_END = "the text does not end as the chat template ends a turn"
_ANY_DATE = r"[\w ,./:-]{4,40}?"


class RenderedText:
    """Reads rendered text for one tokenizer and template."""

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        control: re.Pattern[str],
        reward_token_id: int | None,
        pad_token_id: int,
    ) -> None:
        self._template, self._control = template, control
        texts = {str(t) for t in tokenizer.all_special_tokens} | {
            str(t) for t in tokenizer.added_tokens_decoder.values()
        }
        self.written = frozenset(t for t in texts if template.writes(t))
        """Control tokens that the template writes: in a text they may be its own."""
        convert = tokenizer.convert_ids_to_tokens
        pads = {tokenizer.pad_token, convert(pad_token_id)} & set(tokenizer.all_special_tokens)
        self._pads = frozenset(map(str, pads - {tokenizer.bos_token, tokenizer.unk_token}))
        self._bos = tokenizer.bos_token
        self._reward = None if reward_token_id is None else convert(reward_token_id)
        self.writes_reward = self._reward is not None and template.writes(self._reward)

    @property
    def frame(self) -> Frame:
        return self._template.frame

    def clean(self, text: str, notes: list[str]) -> str:
        """The text with the beginning and the end that the template would give it. ValueError where
        it ends with a generation prompt: then there is no reply."""
        frame = self.frame
        if self._reward and not frame.end.rstrip().endswith(self._reward):
            text = text.removesuffix(self._reward)  # a client appended it: so do we
        text = self._without_padding(text, notes)
        if self._bos and self._bos not in self._pads:
            bare = text
            while bare.startswith(self._bos):
                bare = bare[len(self._bos) :]
            own = self._bos if frame.start.startswith(self._bos) else ""
            if frame.start and len(text) - len(bare) > len(own):
                text = own + bare
                notes.append(DOUBLED)
        text = self._without_stripping(text, notes)
        prompt = frame.generation_prompt.rstrip()
        if prompt and text.rstrip().endswith(prompt):
            raise ValueError(
                "the text ends with a generation prompt, so it has no reply (render whole"
                " conversations with add_generation_prompt=False)"
            )
        return text

    def _without_stripping(self, text: str, notes: list[str]) -> str:
        """The text with the template's own date, end and beginning-of-text token."""
        bos = self._bos or ""
        if bos and self.frame.start.startswith(bos) and not text.startswith(bos):
            changes: list[str] = []  # clients such as verl's strip the token
            whole = self._with_end(self._with_date(bos + text, changes), changes)
            if self.conversations(whole):
                notes += [NO_BEGINNING, *changes]
                return whole
        return self._with_end(self._with_date(text, notes), notes)

    def _without_padding(self, text: str, notes: list[str]) -> str:
        """Without padding tokens at both ends, except one that the template ends with."""
        if not self._pads:
            return text
        pads = "|".join(map(re.escape, self._pads))
        before, frame = text, self.frame
        if not frame.start.startswith(tuple(self._pads)):
            text = re.sub(rf"\A(?:\s*(?:{pads}))+", "", text)
        run = re.search(rf"(?:\s*(?:{pads}))+\s*\Z", text)
        own = next((pad for pad in self._pads if frame.end.rstrip().endswith(pad)), "")
        if run and (not own or len(re.findall(pads, run[0])) > 1):
            text = text[: run.start()] + own
        if text != before:
            notes.append(PADDING)
        return text

    def _with_date(self, text: str, notes: list[str]) -> str:
        """Where the template had a clock: the day that it shows in the first lines is set to that
        of the template."""
        for start in (self.frame.system_start, self.frame.start):
            if not self._template.dates or not start or text.startswith(start):
                continue
            pattern = re.escape(start)
            for date in sorted(self._template.dates, key=len, reverse=True):
                pattern = pattern.replace(re.escape(date), _ANY_DATE)
            if match := re.match(pattern, text):
                notes.append(DATED)
                return start + text[match.end() :]
        return text

    def _with_end(self, text: str, notes: list[str]) -> str:
        """Where the text ends with a turn's end up to white space, exactly the template's end."""
        end = self.frame.end
        if not end or text.endswith(end):
            return text
        core, body = end.strip(), text.rstrip()
        if not core:
            return text + end
        if not body.endswith(core):
            notes.append(OPEN_END)
            return text
        body = body.removesuffix(core)
        before = end[: len(end) - len(end.lstrip())]
        return body + (end.removeprefix(before) if body.endswith(before) else end)

    def messages(self, text: str, notes: list[str]) -> list[Message]:
        """The turns of a rendered text; [] where they cannot be told apart."""
        texts = []
        for messages in self.conversations(text):
            try:
                [again] = self._template.render([messages], None)
            except Exception:  # the template refuses these turns, so it did not make the text
                continue
            if again == text:
                return messages
            texts.append(messages)
        if texts:
            notes.append(RENDERED_AGAIN)
        return texts[0] if texts else []

    def conversations(self, text: str) -> list[list[Message]]:
        """The conversations that the text may be a rendering of: none where its turns cannot be
        told apart."""
        frame, found = self.frame, []
        if not (frame.to_answer and frame.to_question and frame.end and text.endswith(frame.end)):
            return []
        body = text.removesuffix(frame.end)
        if frame.system_start and frame.system_end and body.startswith(frame.system_start):
            system, _, rest = body.removeprefix(frame.system_start).partition(frame.system_end)
            found.append(self._turns([{"role": "system", "content": system}], rest))
        if frame.start and body.startswith(frame.start):
            found.append(self._turns([], body.removeprefix(frame.start)))
        return [messages for messages in found if messages]

    def _turns(self, messages: list[Message], text: str) -> list[Message]:
        """``messages`` and the turns of the text; [] where a turn is missing or holds control
        tokens of the template."""
        rest, more = text, "more"
        while more:
            question, asked, rest = rest.partition(self.frame.to_answer)
            answer, more, rest = rest.partition(self.frame.to_question)
            if not asked:
                return []
            messages = [*messages, user(question), assistant(answer)]
        for message in messages:
            if any(m[0] in self.written for m in self._control.finditer(message["content"])):
                return []
        return messages
