"""--push-to-hub, against a stand-in for the hub on this machine's loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from rmega.export.convert import convert, verify_only
from rmega.export.push import check, push
from tests.export.test_convert import make_run, reward_folder


class Hub(ThreadingHTTPServer):
    """Answers what an upload asks for, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.commits: list[dict] = []
        self.refuses = ""
        """Part of a path that gets 403."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"name": "me", "orgs": [], "type": "user", "auth": {}})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        data = self.rfile.read(int(length)) if length else self.chunks()
        if self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(data))
            self.answer({"url": f"{constants.ENDPOINT}/me/rm"})
        elif "/preupload/" in self.path:
            asked = json.loads(data)["files"]
            files = [{"path": f["path"], "uploadMode": "regular"} for f in asked]
            self.answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in data.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "header":
                    self.server.commits.append(row["value"])
                elif row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    self.server.files[row["value"]["path"]] = content
            self.answer({"commitUrl": f"{constants.ENDPOINT}/me/rm/commit/1", "commitOid": "1"})
        else:  # the metadata of the card are checked
            self.answer({"errors": [], "warnings": []})

    def chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: dict) -> None:
        refused = bool(self.server.refuses) and self.server.refuses in self.path
        body = json.dumps({"error": "not yours"} if refused else content).encode()
        self.send_response(403 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("push")
    base = reward_folder(root / "base", "llama")
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: org/first\n---\n")
    return make_run(base, root / "run")


def test_a_verified_export_is_uploaded(hub: Hub, run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert convert(run=run, output=out, hub_name="me/rm") == 0
    assert f"uploaded: {constants.ENDPOINT}/me/rm/commit/1" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in hub.files} == hub.files
    assert set(hub.files) == {p.name for p in out.iterdir()} and "model.safetensors" in hub.files
    [made], [commit] = hub.made, hub.commits
    assert (made["name"], made["organization"]) == ("rm", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert commit["summary"] == "rmega: step 10, float32"
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "org/first")
    assert "from_pretrained('me/rm'" in card.text and "vllm serve me/rm" in card.text

    hub.files.clear()
    assert verify_only(run=run, output=out, hub_name="me/rm") == 0
    assert "model.safetensors" in hub.files


def test_what_cannot_be_uploaded_is_said_first(hub: Hub, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--push-to-hub me/rm: only verified exports"):
        convert(run=run, output=out, hub_name="me/rm", verify=False)
    for name in ("rm", "me/rm/x", "me/r m", "", "../x"):
        with pytest.raises(ValueError, match="--push-to-hub"):
            convert(run=run, output=out, hub_name=name)
    hub.refuses = "whoami"
    with pytest.raises(ValueError, match="--push-to-hub me/rm: .*403"):
        convert(run=run, output=out, hub_name="me/rm")
    assert not out.exists() and not hub.files and not hub.made


def test_without_a_login(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="(?i)--push-to-hub me/rm: .*(token|login)"):
        check("me/rm", verify=True)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(ValueError, match="--push-to-hub me/rm: "):
        check("me/rm", verify=True)


def test_an_upload_that_fails_names_the_command_to_try_again(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    hub.refuses = "commit"
    with pytest.raises(ValueError, match=f"403.*try again: hf upload me/rm {tmp_path}"):
        push(tmp_path, "me/rm", "message")
