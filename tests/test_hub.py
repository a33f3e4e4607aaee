"""Folders as others lay them out: they load, or what they are is said; none of their code runs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rmega import hub
from rmega.models.hf import read_geometry
from rmega.models.hf_folder import HfFolder
from rmega.preferences.comparison import assistant, user
from rmega.preferences.load_tokenizer import load_tokenizer
from rmega.preferences.tokenizer import PairTokenizer
from tests.conftest import ROOT
from tests.tiny import tiny_llama

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>"}
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory) -> Path:
    """A tokenizer.model trained here: byte-pair encoding with byte fallback, as InternLM2's."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text.splitlines() if line.strip()]),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


def lay_out_as_the_hub(folder: Path, model: Path, *, witness: Path | None = None) -> Path:
    """InternLM2's way: tokenizer.model, no tokenizer.json, ``auto_map`` to code. With ``witness``
    the code is there, and writes that file where it runs."""
    folder.mkdir(parents=True)
    shutil.copy(model, folder / "tokenizer.model")
    special = {**SPECIAL, 600: "<|im_start|>", 601: "<|im_end|>"}
    names = ["tokenization_internlm2.InternLM2Tokenizer", "tokenization_internlm2_fast.Fast"]
    config = {
        "auto_map": {"AutoTokenizer": names},
        "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {
            str(index): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, text in special.items()
        },
        "chat_template": "{{ bos_token }}" + CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    maps = {"AutoConfig": "configuration_internlm2.InternLM2Config"}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "internlm2",
                "auto_map": maps,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            }
        )
    )
    if witness is not None:
        code = f"open({str(witness)!r}, 'a').write(__name__)\n"
        for module in ("configuration_internlm2", *(n.partition(".")[0] for n in names)):
            (folder / f"{module}.py").write_text(code)
    return folder


def test_a_folder_as_the_hub_has_it(sentencepiece_file: Path, tmp_path: Path, capfd) -> None:
    """The ids are sentencepiece's own, and transformers' remarks on the model are not shown."""
    import sentencepiece

    folder = lay_out_as_the_hub(tmp_path / "internlm2", sentencepiece_file)
    tokenizer = PairTokenizer.load(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in ("Which numbers? 12,345 and «ñ» 🙂", "Rewards\nand\n\nfolders.", "  two  spaces"):
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text), text
    ids = tokenizer.encode_conversation([user("a b"), assistant("c")])
    assert [i for i in ids if i in (1, 2, 600, 601)] == [1, 600, 601, 600, 601, 2]
    assert capfd.readouterr() == ("", "")
    assert not [m for m in tokenizer.messages if "fast path" not in m]


def test_missing_protobuf_is_named(sentencepiece_file: Path, tmp_path: Path, monkeypatch) -> None:
    folder = lay_out_as_the_hub(tmp_path / "internlm2", sentencepiece_file)
    for package in ("protobuf", "sentencepiece"):
        module = {"protobuf": "google.protobuf"}.get(package, package)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, m=module, f=find: None if n == m else f(n)
        )
        with pytest.raises(ValueError, match=f"--tokenizer .*: .*pip install {package}"):
            load_tokenizer(folder)
        monkeypatch.undo()


def test_the_project_requires_what_a_tokenizer_model_needs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = text.partition("dependencies = [")[2].partition("\n]")[0]
    assert '"protobuf' in required and '"sentencepiece' in required


LOADS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from rmega.commands.evaluate import length_counter
from rmega.commands.inspect_data import tokenizer_of
from rmega.models.hf import read_geometry
from rmega.preferences.load_tokenizer import load_tokenizer
from rmega.preferences.tokenizer import PairTokenizer
from rmega.training import preflight
loaders = (
    load_tokenizer,
    PairTokenizer.load,
    lambda f: preflight._tokenizer_of(Path(f)),
    length_counter,
    lambda f: tokenizer_of(f, {}, needed=True),
    read_geometry,
)
for folder in sys.argv[1:]:
    for load in loaders:
        try:
            load(folder)
        except ValueError as error:
            assert "\\n" not in str(error), error
"""


def test_no_code_of_a_folder_runs(
    sentencepiece_file: Path, small_llama: Path, tmp_path: Path
) -> None:
    """In no loader, whatever would be typed: nothing is asked."""
    witness, folders = tmp_path / "it ran", {}
    for model_type in ("internlm2", "of_their_own"):
        for vocabulary in ("tokenizer.model", "tokenizer.json"):
            folder = lay_out_as_the_hub(
                tmp_path / model_type / vocabulary, sentencepiece_file, witness=witness
            )
            config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
            (folder / "config.json").write_text(json.dumps(config))
            if vocabulary == "tokenizer.json":
                (folder / "tokenizer.model").unlink()
                shutil.copy(small_llama / "tokenizer.json", folder)
            folders[model_type, vocabulary] = folder
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *map(str, folders.values())],
        input="y\n" * 80,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr
    assert "y/N" not in done.stdout + done.stderr and not witness.exists()
    messages: list[str] = []
    load_tokenizer(folders["of_their_own", "tokenizer.json"], messages=messages)
    assert "tokenizer.json alone is read" in messages[0]
    with pytest.raises(ValueError, match="never run"):
        load_tokenizer(folders["of_their_own", "tokenizer.model"])


def test_pointers_of_git_lfs_are_named(small_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        folder = tmp_path / name
        shutil.copytree(small_llama, folder)
        (folder / name).write_text(POINTER)
        with pytest.raises(ValueError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
            load_tokenizer(folder)
            read_geometry(folder)
            HfFolder(folder)
    for file in folder.glob("tokenizer*"):  # not read for the weights, so no matter there
        file.write_text(POINTER)
    shutil.copy(small_llama / "config.json", folder)
    read_geometry(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(ValueError, match="index.json: a Git LFS pointer"):
        HfFolder(folder)
    (folder / "pytorch_model.bin").write_text(POINTER)
    for file in folder.glob("model.*"):
        file.unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin: a Git LFS pointer"):
        HfFolder(folder)


def test_what_is_no_model_folder_is_named(small_llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    cache = tmp_path / "cache" / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    shutil.copytree(small_llama, snapshot)
    for load, flag in ((hub.resolve_model, "--hf-model"), (load_tokenizer, "--tokenizer")):
        with pytest.raises(ValueError, match=f"{flag} .*PEFT adapter.*org/base"):
            load(str(adapter), flag=flag)
        for folder in (cache, cache / "snapshots"):
            with pytest.raises(ValueError, match=f"{flag} .*name org/name or .*0123abc"):
                load(str(folder), flag=flag)
        with pytest.raises(ValueError, match="hub cache of 1 models.*such as org/name"):
            load(str(cache.parent), flag=flag)
        with pytest.raises(ValueError, match="a file; name the folder"):
            load(str(snapshot / "config.json"), flag=flag)
        load(str(snapshot), flag=flag)
    # beside a whole model the adapter's configuration is a leftover; a tokenizer may lie in one
    shutil.copy(adapter / "adapter_config.json", snapshot)
    assert hub.resolve_model(str(snapshot)) == snapshot
    for file in small_llama.glob("tokenizer*"):
        shutil.copy(file, adapter)
    load_tokenizer(adapter)
    with pytest.raises(ValueError, match="PEFT adapter"):
        hub.resolve_model(str(adapter))
    shutil.copy(small_llama / "config.json", adapter)
    with pytest.raises(ValueError, match="PEFT adapter"):
        hub.resolve_model(str(adapter))


def test_modelscope_names_are_those_of_hf_model(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    for load in (hub.resolve_model, load_tokenizer, hub.model_config_folder):
        with pytest.raises(ValueError, match="pip install modelscope"):
            load("modelscope:org/name")
    with pytest.raises(ValueError, match="--tokenizer modelscope:org/name: pip install"):
        PairTokenizer.load("modelscope:org/name")


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_head_in_a_file_of_its_own_is_named(name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", layers=1, reward_head=False)
    read_geometry(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: a head in a file of its own"):
        read_geometry(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: (file.unlink(), file.symlink_to(file.name)), "not a file that can be read"),
        (lambda file: (file.unlink(), file.mkdir()), "not a file that can be read"),
        (lambda file: file.write_text('{"pad_token": "a", "pad_token": "b"}'), "is there twice"),
        (lambda file: file.write_text('{"model_max_length": {"a": 1}}'), "cannot be loaded"),
        (lambda file: file.write_text("[]"), "a JSON object was expected"),
    ],
)
def test_a_damaged_file_beside_the_vocabulary(damage, message, small_llama, tmp_path) -> None:
    """transformers reads on without some of them, so that roles of tokens are lost."""
    folder = Path(shutil.copytree(small_llama, tmp_path / "model"))
    damage(folder / "tokenizer_config.json")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_tokenizer_config_is_noted(small_llama, tmp_path) -> None:
    folder = Path(shutil.copytree(small_llama, tmp_path / "model"))
    (folder / "tokenizer_config.json").unlink()
    messages: list[str] = []
    load_tokenizer(folder, messages=messages)
    assert any("no tokenizer_config.json" in line for line in messages)


def test_an_adapter_is_a_start(small_llama, tmp_path):
    """Its base model by a path, also one beside it; errors name the flag and what is missing."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    file = adapter / "adapter_config.json"

    def start(base):
        file.write_text(json.dumps({"base_model_name_or_path": base}))
        return hub.resolve_start(str(adapter), flag="--hf-model")

    assert hub.resolve_start(str(small_llama)) == (small_llama, None)
    assert start(str(small_llama)) == (small_llama, adapter)
    shutil.copytree(small_llama, adapter / "base")
    assert start("base") == (adapter / "base", adapter)
    with pytest.raises(ValueError, match="--hf-model .*names no base model"):
        start(None)
    with pytest.raises(ValueError, match=f"--hf-model {adapter}: base model /no/where: no such"):
        start("/no/where")
