"""`push` to a local server that speaks the upload part of the hub's protocol, and what goes there."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import make_tiny
from trained import make_adapter
from typer.testing import CliRunner

from mlx_adapters import adapter as adapters
from mlx_adapters.cli.app import app

TOKEN = "hf_thisMustNotShowAnywhere0123456789"
REPO = "someone/tiny-lora"


class _Hub(BaseHTTPRequestHandler):
    """Creates a repository, takes every file inside the commit. `status` other than 200 refuses all."""

    status = 200
    seen: list[tuple[str, str | None]]
    files: dict[str, bytes]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = type(self)
        kind.seen.append((self.path, self.headers.get("Authorization")))
        answer: dict[str, Any] = {"url": f"http://{self.headers['Host']}/{REPO}"}
        if kind.status != 200:
            answer = {"error": f"no, {self.headers.get('Authorization')}"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    kind.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/{REPO}/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        text = json.dumps(answer).encode()
        self.send_response(kind.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        text = json.dumps({"id": REPO, "sha": "0" * 40, "siblings": []}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[tuple[type[_Hub], str]]:
    kind = type("Hub", (_Hub,), {"seen": [], "files": {}, "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    return make_adapter(make_tiny("llama", root), root / "lora", "lora", {"rank": 4}, seed=1)


def push(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub client reads its environment once."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "mlx_adapters.cli.app", "push", *arguments]
    return subprocess.run(
        command, env={**env, "HF_TOKEN": TOKEN}, capture_output=True, text=True, timeout=100
    )


def test_the_folder_arrives_as_it_is_and_the_token_stays(
    hub: tuple[type[_Hub], str], lora: Path, tmp_path: Path
) -> None:
    kind, endpoint = hub
    done = push(endpoint, tmp_path / "home", str(lora), REPO, "--base", "owner/tiny")
    assert done.returncode == 0, done.stderr
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= kind.files.keys()
    assert kind.files["adapter_model.safetensors"] == (lora / adapters.WEIGHTS).read_bytes()
    assert all(token == f"Bearer {TOKEN}" for _, token in kind.seen)
    stored = b"".join(file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file())
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in stored + b"".join(kind.files.values())
    assert str(lora.parent).encode() not in b"".join(kind.files.values()), "a path of this machine went out"


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_refusal_is_one_line_without_the_token(
    hub: tuple[type[_Hub], str], lora: Path, tmp_path: Path, status: int
) -> None:
    hub[0].status = status
    done = push(hub[1], tmp_path / "home", str(lora), REPO, "--base", "owner/tiny")
    assert done.returncode == 2, done.stderr
    assert f"error: {REPO}: the hub did not take it" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_the_card_says_what_it_is(lora: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((lora / adapters.WEIGHTS).read_bytes()).hexdigest()
    empty = {"prompt": "", "response": "", "extracted": ""}
    records = [
        {"task": "gsm8k", "index": i, "item": str(i), "correct": i < 3, "label": "1", **empty}
        for i in range(10)
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"adapter_sha256": digest, "decoding": "greedy", "records": records}))
    arguments = [
        "push",
        str(lora),
        REPO,
        "--base",
        "owner/tiny",
        "--dry-run",
        "--output",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--eval", str(report)])
    assert done.exit_code == 0, done.output
    assert "nothing was sent" in done.stdout
    card = (tmp_path / "o" / "README.md").read_text()
    assert "| gsm8k | 3/10 | 30.0% | 10.8% - 60.3% |" in card  # Wilson's interval, computed by hand
    assert f"| adapter_model.safetensors | {(lora / adapters.WEIGHTS).stat().st_size} | `{digest}` |" in card
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card
    assert "base_model: owner/tiny" in card
    report.write_text(json.dumps({"adapter_sha256": "0" * 64, "records": records}))
    done = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "p"), "--eval", str(report)])
    assert (done.exit_code, "measures another adapter" in done.stderr) == (2, True)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a/b/c", "--base", "o/n"], "is no hub id"),
        (["tiny", "--base", "o/n"], "is no hub id"),
        (["o/n", "--base", "/tmp"], "which others cannot load"),
        (["o/n", "--base", "o/n", "--license", "Apache 2"], "--license 'Apache 2': give the hub's name"),
    ],
)
def test_what_cannot_go_is_refused_before_anything_is_sent(
    lora: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = CliRunner().invoke(
        app, ["push", str(lora), *arguments, "--dry-run", "--output", str(tmp_path / "o")]
    )
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "o").exists()


def trained_on(adapter: Path, data: str, dst: Path) -> Path:
    """A copy that remembers its training data as a run does."""
    shutil.copytree(adapter, dst)
    meta = json.loads((dst / adapters.META).read_text())
    meta["training"] = {"steps": 3, "data": data, "data_sha256": "d" * 64}
    (dst / adapters.META).write_text(json.dumps(meta))
    return dst


def dry_run(adapter: Path, out: Path, *more: str) -> ModelCard:
    arguments = ["push", adapter, REPO, "--base", "owner/tiny", "--dry-run", "--output", out, *more]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return ModelCard.load(out / "README.md")


def test_the_head_of_the_card_is_the_hubs_format(lora: Path, tmp_path: Path) -> None:
    adapter = trained_on(lora, "owner/rows (train)", tmp_path / "a")
    digest = hashlib.sha256((lora / adapters.WEIGHTS).read_bytes()).hexdigest()
    empty = {"prompt": "", "response": "", "extracted": "", "label": "1"}
    records = [
        {"task": task, "index": i, "item": str(i), "correct": i < right, **empty}
        for task, right in (("ARC-Easy", 3), ("own", 8))
        for i in range(8)
    ]
    settings = {"adapter_sha256": digest, "decoding": "greedy", "template": "alpaca", "data": "hub"}
    (tmp_path / "r.json").write_text(json.dumps({**settings, "records": records}))
    card = dry_run(adapter, tmp_path / "o", "--license", "mit", "--eval", str(tmp_path / "r.json"))
    data = card.data
    assert (data.base_model, data.library_name, data.license) == ("owner/tiny", "peft", "mit")
    assert (data.base_model_relation, data.pipeline_tag) == ("adapter", "text-generation")
    assert data.datasets == ["owner/rows"]
    assert {"lora", "mlx-adapters"} <= set(data.tags)
    easy, own = data.eval_results  # read back from the model-index
    place = (easy.dataset_type, easy.dataset_config, easy.dataset_split, easy.dataset_name)
    assert place == ("allenai/ai2_arc", "ARC-Easy", "test", "ARC-Easy")
    assert (easy.metric_type, easy.metric_value, own.metric_value) == ("accuracy", 0.375, 1.0)
    assert "3 of 8, 95 % interval 0.1368 to 0.6943" in easy.metric_name  # Wilson's, computed by hand
    assert (own.dataset_type, own.dataset_config) == ("own", None)
    assert "d" * 64 in card.text


def test_without_license_and_scores_the_head_names_none(lora: Path, tmp_path: Path) -> None:
    dry_run(lora, tmp_path / "o")
    head = yaml.safe_load((tmp_path / "o" / "README.md").read_text().split("---")[1])
    assert set(head) == {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}


def test_no_folder_of_this_machine_goes_out(lora: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Neither of the data, nor of the adapters that a fusion is made of."""
    from cases import METHODS

    one = trained_on(lora, str(tmp_path / "secret" / "rows.jsonl"), tmp_path / "a")
    base = folders["llama"]
    fields = METHODS["fusion"].settings(base)
    two = make_adapter(base, tmp_path / "fusion", "fusion", fields, seed=2)
    for name, adapter in (("one", one), ("two", two)):
        dry_run(adapter, tmp_path / name)
        sent = [file for file in (tmp_path / name).rglob("*") if file.is_file()]
        assert len(sent) > 4
        for file in sent:
            for place in (tmp_path, base.parent, lora.parent):
                assert str(place).encode() not in file.read_bytes(), file
    assert "| data | rows.jsonl |" in (tmp_path / "one" / "README.md").read_text()
    members = (tmp_path / "two" / "members").rglob("adapter_config.json")
    assert {json.loads(file.read_text())["base_model_name_or_path"] for file in members} == {"owner/tiny"}
