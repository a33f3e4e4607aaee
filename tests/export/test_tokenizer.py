"""The tokenizer of an export: the ids of the training, in files that every transformers since 4.44
reads.

Each rule here stands for a release that refuses or misreads what another one writes;
RMEGA_OTHER_PYTHONS lets those releases read the files themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from rmega.data.fingerprint import PROBES, is_tokenizer_of, with_reward_token, without_reward_token
from rmega.export.tokenizer import EXAMPLE, write_tokenizer
from rmega.preferences.load_tokenizer import load_tokenizer
from rmega.preferences.tokenizer import PairTokenizer
from tests import clients

KINDS = [
    "small_llama",
    "internlm2_tokenizer",
    "internlm2_of_the_hub",
    "smollm2",
    "additional_special_tokens",
    "added_tokens_decoder",
    "base_for_vision",
]
CODE = ["tokenization_internlm2.InternLM2Tokenizer", None]


@pytest.fixture(params=KINDS)
def base(request, tmp_path: Path) -> Path:
    """The tokenizer files of a base model."""
    kind, folder = request.param, tmp_path / "base"
    if kind == "smollm2":
        from tests.made_tokenizers import make_smollm2_tokenizer

        return make_smollm2_tokenizer(folder)
    made = kind in ("small_llama", "internlm2_tokenizer", "internlm2_of_the_hub")
    source = request.getfixturevalue(kind if made else "internlm2_tokenizer")
    files = [f for f in source.iterdir() if f.suffix != ".safetensors"]
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if kind == "additional_special_tokens":  # as transformers 5 saves them: a list
        tokenizer = load_tokenizer(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|new|>"]})
        tokenizer.save_pretrained(folder)
        assert isinstance(read(folder)["extra_special_tokens"], list)
    elif kind == "added_tokens_decoder":  # as transformers 4 does, with a class of its own code
        bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "special": True}
        decoder = {"1": {"content": "<s>", "lstrip": True, "special": True}}
        more = {"added_tokens_decoder": decoder, "add_bos_token": True, "bos_token": bos}
        code = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": CODE}}
        more |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], **code}
        write(folder, {**read(folder), **more})
        (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
        (folder / "added_tokens.json").write_text("{}")
    elif kind == "base_for_vision":  # a dictionary: attributes of a model's own
        write(folder, {**read(folder), "extra_special_tokens": {"image_token": "<|plugin|>"}})
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def write(folder: Path, config: dict) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def export(base: Path, folder: Path, *, render_only: bool = True) -> tuple[PairTokenizer, dict]:
    tokenizer = PairTokenizer.load(base)
    info = {
        "reward_token_id": tokenizer.reward_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "manifest": tokenizer.manifest(),
        "geometry": {"vocab_size": tokenizer.vocab_size},
    }
    folder.mkdir()
    return tokenizer, write_tokenizer(base, folder, info, render_only=render_only)


def test_the_written_files(base: Path, tmp_path: Path) -> None:
    tokenizer, example = export(base, tmp_path / "out")
    config = read(tmp_path / "out")
    # 4.57 refuses a list; older ones know nothing of the field
    assert "extra_special_tokens" not in config
    # code that is not carried along: 4.x stops at a class that it does not find
    assert "auto_map" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # 4.x otherwise makes token_type_ids, which decoders refuse
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    # read from here by 4.44, from the file by others
    assert config["chat_template"] == jinja(tmp_path / "out")
    assert without_reward_token(config["chat_template"]) == tokenizer.template
    assert example["template_writes_reward_token"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not names & {"special_tokens_map.json", "added_tokens.json"}
    assert "added_tokens_decoder" not in config and "add_bos_token" not in config
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert isinstance(config[role], str)
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    # tokenizers before 0.20 reads merges as text only
    assert content["model"]["merges"] and all(
        isinstance(m, str) for m in content["model"]["merges"]
    )
    assert content["padding"] is None and content["truncation"] is None
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    assert special >= set(config.get("additional_special_tokens", ()))

    exported = load_tokenizer(tmp_path / "out")
    assert is_tokenizer_of(exported, tokenizer.manifest())  # for training on from it
    again, example_again = export(tmp_path / "out", tmp_path / "again")
    assert example_again["token_ids"] == example["token_ids"]
    assert again.reward_token_id == tokenizer.reward_token_id
    # training and scoring with the export see the template of the first training: nothing doubles
    assert again.template == tokenizer.template and again.template_hash == tokenizer.template_hash
    chat = [{"role": "user", "content": "你好, 1 + 1?"}, {"role": "assistant", "content": " 2.\n"}]
    ids = tokenizer.encode_conversation(chat)
    assert again.encode_conversation(chat) == ids
    rendered = exported.apply_chat_template(chat, tokenize=False)
    for text in (
        rendered,
        tokenizer.tokenizer.apply_chat_template(
            chat, tokenize=False, chat_template=tokenizer.template
        ),
    ):
        assert again.encode_text(text) == tokenizer.encode_text(text) == ids
    assert exported.encode(rendered) == exported(rendered)["input_ids"] == ids
    prompt = exported.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert not prompt.endswith(example["reward_token"])


def test_the_published_convention_of_internlm2(internlm2_tokenizer, tmp_path: Path) -> None:
    """Its class appends the reward token: the template does not; the tokenizer is the base's."""
    tokenizer, example = export(internlm2_tokenizer, tmp_path / "out", render_only=False)
    assert read(tmp_path / "out")["chat_template"] == tokenizer.template
    assert not example["template_writes_reward_token"]
    exported = load_tokenizer(tmp_path / "out")
    assert exported.encode("a")[0] == exported.bos_token_id


@pytest.mark.parametrize("token", ["</s>", 'a"b', "back\\slash", "你好", "{{ x }}", "'"])
@pytest.mark.parametrize("template", ["{{ 'a' }}", "{{ 'a' }}\n", "{{ 'a' }}\n\n", "x\n  ", ""])
def test_appending_to_a_template(template: str, token: str) -> None:
    """As Jinja renders it in transformers, white space at the end of the template included."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def render(text: str, prompt: bool = False) -> str:
        return _compile_jinja_template(text).render(messages=[], add_generation_prompt=prompt)

    written = with_reward_token(template, token)
    assert without_reward_token(written) == template == without_reward_token(template)
    assert render(written) == render(template) + token
    assert render(written, prompt=True) == render(template)


def jinja(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")


OTHERS = [p for p in os.environ.get("RMEGA_OTHER_PYTHONS", "").split(":") if p]


@pytest.mark.parametrize("python", [sys.executable, *OTHERS])
def test_every_release_reads_the_same(python: str, base: Path, tmp_path: Path) -> None:
    tokenizer, example = export(base, tmp_path / "out")
    texts = [*PROBES, "<s>text</s>", "<|im_start|>user\n"]
    job = {"folder": str(tmp_path / "out"), "texts": texts, "conversation": EXAMPLE}
    (result,) = clients.ask(python, [job])
    assert result["text"] == example["text"] and result["pad"] == example["pad_token"]
    ours = [tokenizer.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert result["ids"] == ours
    assert result["rendered_ids"] == example["token_ids"]  # by a client that adds nothing itself
    assert result["inputs"] == ["attention_mask", "input_ids"]
    assert result["length"] == tokenizer.vocab_size
    exported = load_tokenizer(tmp_path / "out")
    assert result["default_ids"] == [exported.encode(text) for text in texts]
    assert result["special"] == sorted(set(map(str, exported.all_special_tokens)))


def test_written_ids_that_differ_are_refused(internlm2_tokenizer, tmp_path, monkeypatch) -> None:
    from rmega.export import tokenizer as module

    honest = module.config_of
    monkeypatch.setattr(
        module, "config_of", lambda *args: {**honest(*args), "chat_template": "{{ 1 }}"}
    )
    monkeypatch.setattr(Path, "write_text", without_jinja(Path.write_text))
    with pytest.raises(ValueError, match="the written tokenizer gives other ids"):
        export(internlm2_tokenizer, tmp_path / "out")


def without_jinja(write_text):
    def write(path: Path, *args, **kwargs):
        if path.suffix != ".jinja":
            write_text(path, *args, **kwargs)

    return write
