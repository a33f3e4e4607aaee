"""One conversation, one id sequence, one reward, through every door.

Doors: training's comparisons, messages, rendered text, tools/score.py, tools/evaluate.py, the
server's two endpoints, an export's tokenizer in plain transformers. The reference is plain
transformers: the template, then the reward token unless the text ends with it.
"""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmega.data.fingerprint import freeze_date, is_tokenizer_of
from rmega.preferences.comparison import Comparison, assistant, user
from rmega.preferences.fitting import BROKEN_UP
from rmega.preferences.preprocess import PreprocessArgs, preprocess
from rmega.preferences.rendered_text import PADDING
from rmega.preferences.tokenizer import PairTokenizer
from rmega.scoring.scorer import Scorer, scorer

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = f"{{% for m in messages %}}{TURN}{{% endfor %}}"
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": CHATML + PROMPT,
    "begins with <s>": "{{ bos_token }}" + CHATML + PROMPT,
    "ends with </s>, system inside the question": (
        "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\\n' + messages[0].content +"
        " '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set sys = '' %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "system inside the last question, no prompt": (
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "[INST] {% if messages[0].role == 'system' and loop.index >= loop.length - 1 %}"
        "{{ messages[0].content + '\\n\\n' }}{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "prints the date": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string ="
        " strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{% endif %}<|im_start|>system\nToday: {{ date_string }}<|im_end|>\n" + CHATML + PROMPT
    ),
    "prints the date, format in a variable": (
        "{% set f = '%A, %-d %B %Y' %}<|im_start|>system\n{{ strftime_now(f) }}<|im_end|>\n"
        + CHATML
        + PROMPT
    ),
    "cuts earlier thoughts": (
        LOOP + "{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c and"
        " not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and '<think>' not in"
        " c %}<think>\n\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "thinks as Qwen3 does": (
        LOOP + "{% if m.role == 'assistant' %}{% set c = m.content %}{% set thought = '' %}"
        "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
        "{% elif '</think>' in c %}{% set thought = c.split('</think>')[0].rstrip('\n')"
        ".split('<think>')[-1].lstrip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
        "{% endif %}<|im_start|>assistant\n{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n"
        "</think>\n\n{% endif %}{{ c.lstrip('\n') }}<|im_end|>\n{% else %}"
        f"{TURN}{{% endif %}}{{% endfor %}}" + PROMPT
    ),
    "empty thoughts before every answer": (
        LOOP
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '<think>' not in m.content"
        " %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "turns in full-width bars, as DeepSeek's": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] if not"
        " loop.last else m.content }}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    "turns in tokens that are not special": (
        LOOP + "<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "trims": CHATML.replace("m.content", "m.content | trim") + PROMPT,
    "of the tokenizer: none": None,
}
NOT_SPECIAL = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<｜User｜>", "<｜Assistant｜>"),
    *("<user>", "</user>", "<assistant>", "</assistant>", "<system>", "</system>"),
)
"""Added tokens without the mark ``special``: the last eight mark turns in some template."""
DATED = [name for name in TEMPLATES if "date" in name]
CONVERSATIONS = [
    [user("What is a cat?"), assistant("An animal.")],
    [user("Sum 1, 2 and 3.\n"), assistant("6"), user("And 4?"), assistant("10, so\n\n10.")],
    [
        {"role": "system", "content": "Answer in one short sentence."},
        user("Who? 你好 🙂"),
        assistant("<think>\nof the one\n</think>\n\nNobody."),
        user("Why?"),
        assistant("<think>\nof the other\n</think>\n\nBecause."),
    ],
    [
        user("Call <tool_call> it."),
        assistant("<think>\nshort\n</think>\n\n<tool_call>\n{}\n</tool_call>"),
    ],
    [user("a <|pad|> b <|other|> c"), assistant("padding <|pad|><|pad|>, and no more")],
]


def make_tokenizer(template: str | None, *, pad: str | None = "<|pad|>") -> Any:
    """A byte-level tokenizer trained on the conversations, with special tokens behind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [m["content"] for c in CONVERSATIONS for m in c] + ["user", "assistant", "system"]
    backend.train_from_iterator(texts * 3, trainer)
    names = ["<s>", "</s>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|other|>"]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    backend.add_tokens([AddedToken(name, normalized=False) for name in NOT_SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        chat_template=template,
    )


def make_model(folder: Path, template: str | None, *, foreign: bool = False, **options) -> Path:
    """A reward model as transformers writes it; ``foreign``: without a reward token, as TRL,
    Skywork and RLHFlow publish them."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer(template, **options)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=tokenizer.get_vocab()["<|pad|>"],
    )
    if not foreign:
        config.reward_token_id = tokenizer.eos_token_id
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Plain:
    """Plain transformers: what a client has that knows nothing of rmega."""

    def __init__(self, folder: Path, template: str, reward_token_id: int | None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
        self.template, self.reward_token_id = template, reward_token_id

    def text(self, messages: list[dict[str, Any]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False
        )

    def ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids if self.reward_token_id in (None, ids[-1]) else [*ids, self.reward_token_id]

    @torch.no_grad()
    def reward(self, ids: list[int]) -> float:
        hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(self.model.score(hidden))


def escaped(tokenizer: PairTokenizer, messages: list[dict]) -> list[dict]:
    return [{**m, "content": tokenizer.escape(m["content"])[0]} for m in messages]


def ask(model: Scorer, *requests: tuple[str, dict]) -> list[dict]:
    """The server's answers to (path, body), without a network."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    from rmega.scoring.limits import Limits
    from rmega.scoring.queue import ScoringQueue
    from rmega.scoring.server import make_app
    from rmega.scoring.service import RewardService

    queue = ScoringQueue([model].pop, max_tokens=8192, wait=0.0)
    service = RewardService(queue, Limits(), model="m")
    answers = []

    async def talk() -> None:
        queue.start()
        while queue.scorer is None:
            await asyncio.sleep(0.001)
        app, scope = make_app(service), {"type": "http", "method": "POST", "query_string": b""}
        scope |= {"headers": [], "http_version": "1.1", "scheme": "http", "server": ("x", 1)}
        for path, body in requests:
            sent: list[dict] = []

            async def receive(content: bytes = json.dumps(body).encode()) -> dict:
                return {"type": "http.request", "body": content, "more_body": False}

            async def send(message: dict, sent: list[dict] = sent) -> None:
                sent.append(message)

            await app({**scope, "path": path}, receive, send)
            assert sent[0]["status"] == 200, sent
            answers.append(json.loads(b"".join(message.get("body", b"") for message in sent)))

    asyncio.run(talk())
    service.close()
    queue.scorer = None  # fastapi caches the service, and a model keeps the threads of its groups
    return answers


def scored_by_tool(folder: Path, rows: list[dict], tmp_path: Path) -> list[float]:
    from rmega.commands.score import ScoreArgs, main

    source, target = tmp_path / "rows.jsonl", tmp_path / "rewards.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(ScoreArgs(model=str(folder), input=(str(source),), output=str(target), force=True))
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    return [r for line in lines for r in line.get("rewards", [line.get("reward")])]


def evaluated(folder: Path, pairs: list[tuple[list, list]], tmp_path: Path) -> list[float]:
    from rmega.commands.evaluate import EvaluateArgs, main

    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in pairs))
    main(
        EvaluateArgs(
            model=str(folder), data=[str(source)], probes=0, save_scores=str(tmp_path / "scores")
        )
    )
    text = (tmp_path / "scores" / "pairs.scores.jsonl").read_text()
    return [r for line in text.splitlines() for r in json.loads(line)["scores"]]


def at_day(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """transformers' templates see this day."""
    import transformers.utils.chat_template_utils as module

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.strptime(day, "%Y-%m-%d")

    monkeypatch.setattr(module, "datetime", Clock)


def close(rewards: list[float], expected: list[float]) -> None:
    """1e-5 of the largest reward, as everywhere against plain transformers."""
    assert len(rewards) == len(expected)
    differences = np.abs(np.subtract(rewards, expected))
    assert differences.max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_door_gives_the_same(
    name: str, foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmega.export.tokenizer import write_tokenizer

    folder = make_model(tmp_path / "model", TEMPLATES[name], foreign=foreign)
    at_day(monkeypatch, "2026-11-26")
    others = [[*c[:-1], assistant(c[-1]["content"] + " Or not.")] for c in CONVERSATIONS]
    with scorer(folder) as model:
        tokenizer = model.tokenizer
        assert (tokenizer.reward_token_id is None) == foreign
        plain = Plain(folder, tokenizer.template, tokenizer.reward_token_id)
        texts = [plain.text(escaped(tokenizer, c)) for c in CONVERSATIONS]
        ids = [plain.ids(text) for text in texts]
        rewards = [plain.reward(i) for i in ids]
        assert len({round(r, 4) for r in rewards}) == len(rewards)

        assert [tokenizer.encode_conversation(c) for c in CONVERSATIONS] == ids
        for one, own in zip(CONVERSATIONS[:-1], ids, strict=False):  # nothing in them is escaped
            assert own == plain.ids(plain.text(one))
        for one, other, own in zip(CONVERSATIONS, others, ids, strict=True):
            encoded = tokenizer.encode_comparison(
                Comparison(prompt=one[:-1], responses=[one[-1:], other[-1:]], scores=[1.0, 0.0])
            )
            assert [*encoded.prefix, *encoded.suffixes[0]] == own
        close(model.score_conversations(CONVERSATIONS), rewards)

        pad = tokenizer.tokenizer.pad_token
        reward_text = "" if foreign else tokenizer.tokenizer.eos_token
        for text, own in zip(texts, ids, strict=True):
            for variant in (text, text.rstrip(), pad * 3 + text, text + pad * 2):
                assert model.encode(variant) == own, variant
            if not text.rstrip().endswith(reward_text or "never"):
                assert model.encode(text + reward_text) == own
            if text.startswith("<s>"):
                assert model.encode("<s>" + text) == own
                assert model.encode(text.removeprefix("<s>")) == own
        prompt = tokenizer.tokenizer.apply_chat_template(
            CONVERSATIONS[0][:1],
            chat_template=tokenizer.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        if "add_generation_prompt" in tokenizer.template:
            with pytest.raises(ValueError, match="generation prompt"):
                model.encode(prompt)
        bare = [i[: len(i) - (not foreign)] for i in ids]  # without the reward token
        *own, first, second, third = ask(
            model,
            ("/score", {"conversations": CONVERSATIONS}),
            ("/get_reward", {"query": texts}),
            *(("/classify", {"input": g, "use_activation": False}) for g in (texts, ids, bare)),
        )
        for answer in own:
            close(answer["rewards"], rewards)
        for answer in (first, second, third):
            close([row["probs"][0] for row in answer["data"]], rewards)
        at_day(monkeypatch, "2026-12-25")  # a client's clock goes on
        plain.template = TEMPLATES[name] or tokenizer.template
        texts = [plain.text(escaped(tokenizer, c)) for c in CONVERSATIONS]
        if "format in a variable" not in name:  # what it prints is not known to be a date
            assert [model.encode(text) for text in texts] == ids
        manifest = tokenizer.manifest()

    close(scored_by_tool(folder, [{"messages": c} for c in CONVERSATIONS], tmp_path), rewards)
    rows = [{"text": text} for text in texts]
    if "format in a variable" not in name:
        close(scored_by_tool(folder, rows, tmp_path), rewards)
    rows = [
        {"prompt": a[:-1], "responses": [a[-1]["content"], b[-1]["content"]]}
        for a, b in zip(CONVERSATIONS, others, strict=True)
    ]
    close(scored_by_tool(folder, rows, tmp_path)[::2], rewards)
    pairs = list(zip(CONVERSATIONS, others, strict=True))
    close(evaluated(folder, pairs, tmp_path)[::2], rewards)

    out = tmp_path / "export"
    out.mkdir()
    info = {
        "manifest": manifest,
        "reward_token_id": manifest["reward_token_id"],
        "pad_token_id": manifest["pad_token_id"],
        "geometry": {"vocab_size": manifest["vocab_size"]},
    }
    write_tokenizer(folder, out, info)
    from transformers import AutoTokenizer

    client = AutoTokenizer.from_pretrained(out)
    for conversation, own in zip(CONVERSATIONS, ids, strict=True):
        text = client.apply_chat_template(escaped(tokenizer, conversation), tokenize=False)
        plain.tokenizer = client
        assert plain.ids(text) == own
    assert is_tokenizer_of(client, manifest)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name]])
def test_no_text_forges_a_turn(name: str) -> None:
    """Markers of turns are broken up in contents, whether or not the tokenizer calls them special;
    thoughts stay."""
    tokenizer = PairTokenizer(make_tokenizer(TEMPLATES[name]))
    tokens = [str(t) for t in tokenizer.tokenizer.added_tokens_decoder.values()]
    markers = [t for t in tokens if t in NOT_SPECIAL[6:]] if "not special" in name else []
    markers += [t for t in tokens if t not in NOT_SPECIAL or "｜" in t]
    vocabulary = tokenizer.tokenizer.get_vocab()

    def count(content: str) -> list[int]:
        ids = tokenizer.encode_conversation([user(content), assistant(content), *probe])
        return [ids.count(vocabulary[marker]) for marker in markers]

    probe = [user("And?"), assistant("So.")]
    plain = count("no marker")
    for marker in markers:
        broken, num = tokenizer.escape(marker + "x" + marker)
        assert num == 2 and marker not in broken
        assert count(f"a{marker}b{marker}") == plain, marker
    for kept in NOT_SPECIAL[:4]:
        assert tokenizer.escape(kept) == (kept, 0)


@pytest.mark.parametrize("name", DATED)
def test_data_of_two_days_are_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder, rows = make_model(tmp_path / "model", TEMPLATES[name]), tmp_path / "rows.jsonl"
    pairs = [{"chosen": c, "rejected": [*c[:-1], assistant("No.")]} for c in CONVERSATIONS]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    written, manifests = [], []
    for day in ("2026-11-26", "2026-12-25"):
        at_day(monkeypatch, day)
        prefix = str(tmp_path / day)
        manifests.append(
            preprocess(
                PreprocessArgs(
                    input=[str(rows)], tokenizer=str(folder), output_prefix=prefix, workers=1
                )
            )
        )
        written.append(Path(prefix + ".bin").read_bytes())
    assert written[0] == written[1]
    assert manifests[0]["template_hash"] == manifests[1]["template_hash"]
    frozen = manifests[0]["chat_template"]
    assert "strftime_now(" not in frozen or frozen.startswith("{%- macro strftime_now(")
    assert "prints the date: 26 Jul 2024" in capsys.readouterr().err


def test_a_template_is_frozen_once() -> None:
    for name in DATED:
        frozen = freeze_date(TEMPLATES[name])
        assert frozen != TEMPLATES[name] and freeze_date(frozen) == frozen
    plain = "{{ '26 Jul 2024' }} {{ messages }}"
    assert freeze_date(plain) == plain


def test_text_over_the_limit_is_cut_as_the_messages_are(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", TEMPLATES["begins with <s>"])
    long = [{"role": "system", "content": "Short."}]
    for number in range(5):
        long += [user(f"question {number} " + "word " * 12), assistant(f"answer {number}")]
    for policy in ("left-prompt", "right"):
        tokenizer = PairTokenizer.load(folder, max_length=150, overlong=policy)
        plain = Plain(folder, tokenizer.template, tokenizer.reward_token_id)
        notes: list[list[str]] = [[], []]
        ids = tokenizer.encode_conversation(long, notes=notes[0])
        assert tokenizer.encode_text(plain.text(long), notes=notes[1]) == ids
        assert len(ids) <= 150 and notes[0] == notes[1] and notes[0][0].startswith("cut")


def test_what_is_changed_in_a_text_is_noted(tmp_path: Path) -> None:
    tokenizer = PairTokenizer.load(make_model(tmp_path / "model", TEMPLATES["chatml"]))
    text = tokenizer.tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    for changed, note in (
        ("<|pad|>" + text, PADDING),
        (text.replace("cat", "c<|other|>at"), BROKEN_UP),
        (text.replace("cat", "c<|pad|>at"), BROKEN_UP),
        (text.removesuffix("<|im_end|>\n"), "the text does not end as"),
    ):
        notes: list[str] = []
        tokenizer.encode_text(changed, notes=notes)
        assert len(notes) == 1 and notes[0].startswith(note), (changed, notes)
    for nothing in ("", "  ", "<|pad|><|pad|>"):
        with pytest.raises(ValueError, match="no text"):
            PairTokenizer.load(tmp_path / "model", chat_template=None).encode_text(nothing)


def test_a_foreign_model_can_be_given_a_reward_token(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", CHATML, foreign=True)
    with scorer(folder) as model:
        assert "is a reward model without a reward token" in model.tokenizer.messages[0]
        bare = model.encode(CONVERSATIONS[0])
    with scorer(folder, reward_token="</s>") as model:
        end = model.tokenizer.tokenizer.eos_token_id
        assert model.encode(CONVERSATIONS[0]) == [*bare, end]
    ours = make_model(tmp_path / "ours", CHATML)
    with pytest.raises(ValueError, match="--reward-token <s>: the model was trained with reward"):
        with scorer(ours, reward_token="<s>"):
            pass
    with scorer(ours, reward_token="</s>") as model:
        assert model.encode(CONVERSATIONS[0]) == [*bare, end]


def test_one_row_over_the_limit_leaves_the_others_their_rewards(tmp_path: Path, capfd) -> None:
    """Trained with --overlong drop or error: the row is counted and named."""
    folder = make_model(tmp_path / "model", CHATML)
    long = [user("word " * 400), assistant("so")]
    rows = [{"messages": c} for c in (*CONVERSATIONS[:2], long)]
    expected = scored_by_tool(folder, rows[:2], tmp_path)
    manifest = PairTokenizer.load(folder).manifest() | {"max_length": 200}
    pairs = [(c, [*c[:-1], assistant("No.")]) for c in (*CONVERSATIONS[:2], long)]
    for policy in ("drop", "error"):
        recipe = json.dumps(manifest | {"overlong": policy})
        (folder / "reward_recipe.json").write_text(recipe)
        capfd.readouterr()
        rewards = scored_by_tool(folder, rows, tmp_path)
        assert rewards[:2] == expected and rewards[2:] == [None]
        lines = (tmp_path / "rewards.jsonl").read_text().splitlines()
        assert "rows.jsonl:3: longer than --max-length" in json.loads(lines[2])["error"]
        err = capfd.readouterr().err
        assert "rows.jsonl:3" in err and "1 rows without a reward" in err
        evaluated(folder, pairs, tmp_path)
        out = capfd.readouterr().out
        assert "left out:" in out and "pairs.jsonl:3" in out


def test_cuts_reach_the_evaluation(tmp_path: Path, capfd) -> None:
    from rmega.commands.evaluate import EvaluateArgs, main

    folder = make_model(tmp_path / "model", CHATML)
    manifest = PairTokenizer.load(folder).manifest() | {"max_length": 100, "overlong": "right"}
    (folder / "reward_recipe.json").write_text(json.dumps(manifest))
    source = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Why? " * 3, "chosen": "word " * 200, "rejected": "No."}
    source.write_text(json.dumps(pair) + "\n")
    main(
        EvaluateArgs(
            model=str(folder), data=[str(source)], probes=0, json=str(tmp_path / "out.json")
        )
    )
    notes = json.loads((tmp_path / "out.json").read_text())["sets"]["pairs"]["notes"]
    assert notes == {"cut: end of the response left out": 1}
    assert "1 responses: cut: end of the response left out" in capfd.readouterr().out


def test_tool_calls_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    tokenizer = PairTokenizer.load(make_model(tmp_path / "model", CHATML))
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": deep}]}
    with pytest.raises(ValueError, match="nested too deeply"):
        tokenizer.encode_conversation([user("x"), call])


def test_a_pad_token_behind_the_vocabulary(tmp_path: Path) -> None:
    """The model knows fewer ids than its tokenizer: such ids are neither pad nor reward token, and
    a text with one is refused."""
    folder = make_model(tmp_path / "model", CHATML)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    made = PairTokenizer.load(folder)
    assert made.vocab_size == config["vocab_size"] + 1
    assert made.pad_token_id < config["vocab_size"]
    with pytest.raises(ValueError, match=f"--reward-token <pad>.*below {config['vocab_size']}"):
        PairTokenizer.load(folder, reward_token="<pad>")
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(folder)
    with scorer(folder) as model:
        with pytest.raises(ValueError, match="no embedding for .*zzz"):
            model.encode([user("zzz"), assistant("a")])
        model.encode([user("a <pad> b"), assistant("a")])


def test_prefixes_of_a_model_without_a_reward_token(tmp_path: Path) -> None:
    tokenizer = PairTokenizer.load(make_model(tmp_path / "model", CHATML, foreign=True))
    encoded = tokenizer.encode_comparison(
        Comparison(
            prompt=[user("x")], responses=[[assistant("a")], [assistant("ab")]], scores=[1, 0]
        )
    )
    assert all(len(s) for s in encoded.suffixes)
    assert np.array_equal(encoded.suffixes[0][-1:], encoded.suffixes[1][-1:])


def test_data_for_a_model_without_a_reward_token(tmp_path: Path, capsys) -> None:
    from rmega.data.indexed import open_preferences
    from rmega.data.integrity import verify

    folder, rows = make_model(tmp_path / "model", CHATML, foreign=True), tmp_path / "rows.jsonl"
    pairs = [{"chosen": c, "rejected": [*c[:-1], assistant("No.")]} for c in CONVERSATIONS]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prefix = str(tmp_path / "data")
    manifest = preprocess(
        PreprocessArgs(input=[str(rows)], tokenizer=str(folder), output_prefix=prefix, workers=1)
    )
    assert manifest["reward_token_id"] is None and verify(open_preferences(prefix)) == []
    assert "no reward token (read at the last token of the text)" in capsys.readouterr().err


def test_the_training_looks_at_the_ids_not_at_the_size_of_the_tokenizer(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from rmega.training import preflight

    manifest = {
        "vocab_size": 515,
        "tokenizer_fingerprint": "x",
        "reward_token_id": 2,
        "template_hash": "y",
    }
    data = SimpleNamespace(
        manifest=manifest,
        prefix="data",
        tokens=np.array([5, 513, 2], np.int32),
        sequence_lengths=np.array([1, 1, 1], np.int32),
        document_indices=np.array([0, 3], np.int64),
    )
    model = SimpleNamespace(vocab_size=514, max_position_embeddings=2048)
    preflight.check_dataset("--data-path", data, data, model, tmp_path)
    data.tokens[1] = 514
    with pytest.raises(ValueError, match="data: .*514.*vocabulary"):
        preflight.check_dataset("--data-path", data, data, model, tmp_path)


def test_a_head_that_was_read_elsewhere_is_reported(tmp_path: Path, capsys) -> None:
    from types import SimpleNamespace

    from rmega.training import preflight

    folder = make_model(tmp_path / "model", CHATML, foreign=True)
    for token, warns in ((None, False), (2, True)):
        data = SimpleNamespace(manifest={"reward_token_id": token}, prefix="data")
        preflight.check_reward_token(data, folder)
        assert ("trained to be read at the last token" in capsys.readouterr().out) == warns


def test_verifying_runs_only_the_code_that_an_export_writes(tmp_path: Path) -> None:
    from rmega.export.rewards import check_code
    from rmega.models import BACKBONES

    code = BACKBONES["internlm2"].code
    for file in code:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = {"AutoConfig": "configuration_internlm2.C", "AutoModel": "modeling_internlm2.M"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": names}))
    check_code(tmp_path, code)
    (tmp_path / "modeling_internlm2.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="modeling_internlm2.py: not the code"):
        check_code(tmp_path, code)
