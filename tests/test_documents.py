"""Every command in the documents: parsed by the program it names, and run at a tiny scale in the
order of the pages.

A command is neither skipped nor believed: ``parse`` fails for one that it cannot check, ``run`` for
one that is not on the short list of what cannot be run here (``PARSED_ONLY``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dist import run_distributed
from tests.runs import train_and_say

# In the order of a reader: later pages use what the commands of the README made.
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
]
# Checked by ``parse`` alone: the set-up installs packages; the tests are running already; figures
# take minutes.
PARSED_ONLY = ("source", "pip", "examples/quickstart.sh", "tests/run.sh", ".ci/run", "benchmarks/")


@dataclass(frozen=True)
class Command:
    """A command line of a document, split as a shell would; ``$NAME`` stands for what the page has
    set it to."""

    document: str
    line: int
    words: tuple[str, ...]
    fenced: bool = True

    @property
    def program(self) -> str:
        """The file that is run, or the first word."""
        return next(
            (
                w
                for w in self.words
                if w.endswith((".py", ".sh", ".ci/run")) and w != "tools/launch.py"
            ),
            self.words[0],
        )

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {shlex.join(self.words)}"


def commands_of(path: Path) -> Iterator[Command]:
    """The lines of all ```bash blocks, and commands in backticks that are whole (no "...")."""
    name, known = str(path.relative_to(ROOT)), {}
    in_block, joined, start = False, "", 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            in_block = line == "```bash"
        elif in_block:
            start = start if joined else number
            joined += line.removesuffix("\\") + (" " if line.endswith("\\") else "")
            if line.endswith("\\"):
                continue
            words = shlex.split(joined, comments=True)
            joined = ""
            if len(words) == 1 and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                known.update([words[0].split("=", 1)])
            elif words:
                yield Command(
                    name, start, tuple(string.Template(w).safe_substitute(known) for w in words)
                )
        else:
            for text in re.findall(r"`((?:python|torchrun|bash) [^`]+)`", line):
                if "..." not in text:
                    yield Command(name, number, tuple(shlex.split(text)), fenced=False)


COMMANDS = [command for path in DOCUMENTS for command in commands_of(path)]


# ---- parsing


class Parsed(BaseException):
    """Thrown out of a program as soon as it has read its flags."""


def parse(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError or SystemExit where the program does not exist or does not take these
    words."""
    first, *rest = words
    if first == "torchrun" or (first == "python" and rest[0] == "tools/launch.py"):
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest[first == "python" :])
        parse(("python", given.training_script, *given.training_script_args), monkeypatch)
    elif first == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
    elif first == "python":
        parse_python(rest[0], rest[1:], monkeypatch)
    elif first == "bash":
        parse_script(rest[0], rest[1:], monkeypatch)
    elif first == "pip":
        extras = re.findall(r"rmega\[([\w,]+)\]|\.\[([\w,]+)\]", " ".join(rest))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert rest[0] == "install" and all(
            e in known for pair in extras for e in "".join(pair).split(",")
        )
    else:
        assert words == ("source", ".venv/bin/activate"), "no way to check this command"


def parse_python(program: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the program and stop it where its flags are read: by the one parser of rmega, or by
    argparse."""
    import argparse

    import tyro

    def stop_after(original):
        def wrapper(*args, **kwargs):
            original(*args, **kwargs)
            raise Parsed

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *argv])
        patch.chdir(ROOT)
        if "rmega" in (ROOT / program).read_text():
            patch.setattr(tyro, "cli", stop_after(tyro.cli))
        else:
            patch.setattr(
                argparse.ArgumentParser,
                "parse_args",
                stop_after(argparse.ArgumentParser.parse_args),
            )
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / program), run_name="__main__")


def parse_script(script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """bash reads the script; its flags are its own or those of the program that it hands them
    to."""
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0
    if script == "tests/run.sh":
        options = dict(zip(argv, argv[1:], strict=False))  # -k WORD, -m EXPRESSION, files
        files = [
            w
            for i, w in enumerate(argv)
            if not w.startswith("-") and not (i and argv[i - 1] in ("-k", "-m"))
        ]
        assert {w for w in argv if w.startswith("-")} <= {"-k", "-m", "-x"}
        text = "".join((ROOT / file).read_text() for file in files)
        assert "-k" not in options or re.search(
            rf"^def test_\w*{options['-k']}", text, re.MULTILINE
        )
        assert "-m" not in options or set(options["-m"].split()) <= {"slow", "not", "or", "and"}
        return
    own = (
        subprocess.run(
            ["bash", str(ROOT / script), "--help"], capture_output=True, text=True
        ).stdout
        if script == "examples/quickstart.sh"
        else ""
    )
    for flag in (word for word in argv if word.startswith("--")):
        assert re.search(rf"^ *{flag} ", own, re.MULTILINE) or script.startswith("examples/"), flag
        if flag not in own:
            from rmega.cli import parse_args
            from rmega.config import TrainingConfig

            value = argv[argv.index(flag) + 1 :][:1]
            parse_args(TrainingConfig, ["--hf-model", "m", "--data-path", "d", flag, *value])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.document}:{c.line}")
def test_a_command_is_understood(command, monkeypatch):
    if (
        not command.fenced and len(command.words) == 2
    ):  # a program is named in a sentence, not its flags
        assert (ROOT / command.words[1]).is_file()
    else:
        parse(command.words, monkeypatch)


def test_what_cannot_be_checked_fails(monkeypatch):
    for words in (
        "docker run rmega",
        "python tools/none.py",
        "python -m tests.none",
        "python tools/score.py --modell x",
        "bash none.sh",
        "torchrun --nproc-per-node 8 examples/pretrain_reward.py --tq 2",
        "pip install 'rmega[nothing]'",
        "bash examples/quickstart.sh --stepps 3",
        "bash tests/run.sh tests/ops/test_ops.py -k not_one",
        "bash tests/run.sh tests/test_none.py",
        "bash tests/run.sh --quick",
        "python examples/score_with_transformers.py --folder x",
    ):
        with pytest.raises((AssertionError, SystemExit, FileNotFoundError)):
            parse(tuple(shlex.split(words)), monkeypatch)


def test_the_documents_have_commands():
    found = {c.document for c in COMMANDS if c.fenced}
    assert found >= {
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{n}.md" for n in ("data", "evaluation", "export", "training")),
    }
    assert sum(c.fenced for c in COMMANDS) > 20


# ---- running

# What makes a command small enough for two cores and a model of 260 thousand weights; a flag given
# twice counts last.
TINY = {
    "tools/preprocess_pref.py": ["--max-length", "256", "--workers", "1"],
    "examples/pretrain_reward.py": [
        "--tp",
        "1",
        "--pp",
        "1",
        "--dp",
        "1",
        "--global-batch-size",
        "16",
        "--precision",
        "fp32",
        "--tensorboard",
        "off",
    ],
    "tools/evaluate.py": ["--limit", "24"],
}
# The same beside a flag without which it has no effect.
TINY_BESIDE = {"--valid-data-path": ["--eval-interval", "2"], "--model": ["--probes", "4"]}
# Words that stand for something of the reader's own.
PLACEHOLDERS = {"PREFIX": "runs/data/train", "RUN": "runs/placeholder"}


def in_folder(rank: int, world_size: int, folder: str, argv: list[str]) -> tuple[int, str]:
    """A training run typed in a folder: (exit code, what it printed)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return train_and_say(rank, world_size, argv)
    finally:
        os.chdir(before)


class Workspace:
    """A folder that looks like a checkout in which a reader types the commands, and what each
    printed."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.outputs: dict[str, str] = {}
        for name in (
            "tools",
            "examples",
            "rmega",
            "tests",
            "benchmarks",
            "csrc",
            "setup.py",
            "pyproject.toml",
        ):
            (root / name).symlink_to(ROOT / name)
        rows = [
            json.loads(line)
            for line in (
                (ROOT / "examples" / "data" / "demo.valid.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            )
        ]
        self.write("heldout.jsonl", rows)
        self.write("train.jsonl", rows)
        self.write(
            "published.jsonl",
            [
                {"id": r["id"], "scores": [len(str(r[n])) for n in ("chosen", "rejected")]}
                for r in rows
            ],
        )
        self.write(
            "conversations.jsonl", [{"messages": [*r["prompt"], *r["chosen"]]} for r in rows[:8]]
        )

    def write(self, name: str, rows: list[dict]) -> None:
        (self.root / name).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )

    def run(self, command: Command) -> str:
        """What the command prints, at a tiny scale; AssertionError where it fails."""
        words = [
            (
                str(self.model)
                if w in ("MODEL", "SMOLLM2_135M", ".cache/models/smollm2-135m")
                else PLACEHOLDERS.get(w, w)
            )
            for w in command.words
        ]
        words += TINY.get(command.program, [])
        if command.program in ("examples/pretrain_reward.py", "tools/evaluate.py"):
            words += [w for flag, more in TINY_BESIDE.items() if flag in words for w in more]
        if command.program == "tools/serve.py":
            return self.serve(words[1:])
        if command.program == "examples/pretrain_reward.py":
            steps = "--train-steps" in words
            words += ["--train-steps", "2"] if steps else ["--train-epochs", "0.1"]
            # One under its launcher; launchers and their words have tests of their own.
            return self.train(words) if command.document == "README.md" else self.main(words)
        assert words[0] == "python", f"{command}: no way to run it"
        heard = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(heard),
            contextlib.redirect_stderr(heard),
        ):
            patch.chdir(self.root)
            patch.setattr(sys, "argv", words[1:])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert end.value.code in (0, None), f"{command}\n{heard.getvalue()[-3000:]}"
        return heard.getvalue()

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHON": sys.executable,
            "PYTHONUNBUFFERED": "1",
        }

    def train(self, words: list[str]) -> str:
        """One process and a few steps, under the launcher that the command names."""
        if words[0] == "torchrun":
            words = ["python", "-m", "torch.distributed.run", *words[1:]]
        if "--nproc-per-node" in words:
            place = words.index("--nproc-per-node")
            words = [*words[:place], "--standalone", "--nproc-per-node", "1", *words[place + 2 :]]
        words[0] = sys.executable
        done = subprocess.run(
            words,
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    def main(self, words: list[str]) -> str:
        """The same without a launcher, in a process that has imported everything."""
        argv = words[words.index("examples/pretrain_reward.py") + 1 :]
        ((code, printed),) = run_distributed(in_folder, 1, str(self.root), argv)
        assert code == 0, printed[-3000:]
        return printed

    def serve(self, words: list[str]) -> str:
        pytest.importorskip("fastapi", reason="the extra serve is not installed")
        pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
        pytest.importorskip("uvicorn", reason="the extra serve is not installed")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            address, until = f"http://127.0.0.1:{port}", time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).read()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < until, (
                        "the server does not answer"
                    )
                    time.sleep(0.1)
            body = json.dumps(
                {
                    "conversations": [
                        [
                            {"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello"},
                        ]
                    ]
                }
            ).encode()
            request = urllib.request.Request(
                f"{address}/score", body, {"Content-Type": "application/json"}
            )
            assert len(json.load(urllib.request.urlopen(request, timeout=60))["rewards"]) == 1
            server.send_signal(signal.SIGTERM)
            heard = server.communicate(timeout=60)[0]
            assert server.returncode == 0, heard
            return heard
        finally:
            server.kill()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, small_llama) -> Workspace:
    """After the commands of the README, on which the other pages build."""
    pytest.importorskip("matplotlib", reason="--report needs the extra plots")
    place = Workspace(tmp_path_factory.mktemp("workspace"), small_llama)
    run_document(place, "README.md")
    return place


def run_document(place: Workspace, document: str) -> None:
    for command in COMMANDS:
        if (
            command.document == document
            and command.fenced
            and not command.program.startswith(PARSED_ONLY)
        ):
            same = next(
                (c for c in COMMANDS if c.words == command.words and str(c) in place.outputs), None
            )
            place.outputs[str(command)] = place.outputs[str(same)] if same else place.run(command)


@pytest.mark.parametrize("document", [str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_commands_run(document, workspace):
    if document != "README.md":
        run_document(workspace, document)
    ran = [c for c in COMMANDS if c.document == document and str(c) in workspace.outputs]
    expected = [
        c
        for c in COMMANDS
        if c.document == document and c.fenced and not c.program.startswith(PARSED_ONLY)
    ]
    assert ran == expected
    if document == "README.md":
        for made in (
            "runs/data/train.json",
            "runs/first/config.json",
            "runs/export/reward_recipe.json",
            "runs/report/report.html",
            "runs/first/report.html",
        ):
            assert (workspace.root / made).is_file(), made
        rewards = (workspace.root / "runs" / "rewards.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in rewards] == list(range(112))


def test_python_of_the_readme_runs(workspace, capsys):
    """In the folder that its commands made."""
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    rewards, pack = capsys.readouterr().out.splitlines()
    assert len(json.loads(rewards)) == 2 and pack.startswith("torch.Size([1, ")


def shape(line: str) -> str:
    """A line without what differs between the model that is shown and the tiny one: numbers, types,
    its name."""
    line = re.sub(r"\S*(?:smollm2-135m|small_llama)\S*", "MODEL", line)
    line = re.sub(r"\bb?float(16|32)", "TYPE", line)
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d,.:]*(?:e[-+]?\d+)?", "#", line)).strip()


def test_shown_output_is_what_the_commands_print(workspace):
    """Each line of the README's output blocks is, but for its numbers, a line that its commands
    printed.

    A finding ([ok], [!]) depends on the numbers: of it only the first words are looked up in the
    program.
    """
    texts = [*workspace.outputs.values(), (workspace.root / "runs" / "rewards.jsonl").read_text()]
    printed = {shape(line) for text in texts for line in text.splitlines()}
    blocks = re.findall(
        r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    lines = [
        line
        for block in blocks
        for line in block.splitlines()
        if line.strip() and line.strip() != "..."
    ]
    assert len(lines) > 10
    for line in lines:
        if line.startswith("["):
            sentence = line[5:].removeprefix("valid: ")  # in the log of a training, that of a set
            assert (
                " ".join(sentence.split()[:2])
                in (ROOT / "rmega/evaluation/findings.py").read_text()
            ), line
        elif not line.startswith("     "):  # a finding continues
            assert shape(line) in printed, line


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_quick_start(family, tmp_path, small_llama):
    """The README's first command, with a model that is there and three steps: everything but the
    set-up."""
    from tests.made_models import make_family

    model = small_llama if family == "llama" else make_family(family, tmp_path / "models" / family)
    place = Workspace(tmp_path, small_llama)
    env = {**place.environment(), "VIRTUAL_ENV": sys.prefix}
    if not (Path(sys.prefix) / "bin" / "python").exists():
        pytest.skip("this Python has no bin/python under sys.prefix")
    stamp = subprocess.run(
        ["bash", "-c", "source examples/setup_env.sh; rmega_find_python; rmega_stamp"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert stamp.returncode == 0, stamp.stderr
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "setup.stamp").write_text(stamp.stdout)  # nothing is installed
    done = subprocess.run(
        [
            "bash",
            "examples/quickstart.sh",
            "--model",
            str(model),
            "--data",
            "examples/data/demo.train.jsonl",
            "--steps",
            "3",
            "--max-length",
            "256",
            "--nproc",
            "2",
            "--tp",
            "2",
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (
        "\nverified\n" in done.stdout and (tmp_path / "runs" / "quickstart" / "finished").is_file()
    )
    shutil.rmtree(tmp_path / "runs")


def test_the_architecture_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set()
    for folder, table in re.findall(
        r"\*\*`(rmega/[\w/]*)`\*\*\n(.*?)(?=\n\*\*`|\Z)", page, re.DOTALL
    ):
        named |= {
            folder + name for name in re.findall(r"^\| `([\w/]+\.py)` \|", table, re.MULTILINE)
        }
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "rmega").rglob("*.py")}
    assert named == {name for name in files if not name.endswith("__init__.py")}
