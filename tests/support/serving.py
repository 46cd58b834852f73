"""A running `mlx-adapters serve` with three adapters, and what `generate` answers."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mlx_adapters.cli.app import app

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "prefix": {"num_virtual_tokens": 3},  # a cache that starts full
    "prompt": {"num_virtual_tokens": 3},  # tokens in front
}


PROMPTS = ("tom has 3 apples", "how many ?", "buys 4 more")


HOLD = 12


LONG = 100_000  # the tiny models' answers go on until told to stop


class Running:
    """A server process and how to ask it."""

    def __init__(self, folder: Path, *options: str) -> None:
        adapters = [part for name in METHODS for part in ("--adapter", f"{name}={folder.parent / name}")]
        command = [sys.executable, "-m", "mlx_adapters.cli.app", "serve", str(folder), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *adapters, *options], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stderr
        line = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, line
        self.port = int(found[1])

    def send(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            kind = {"Content-Type": "application/json"} if body is not None else {}
            link.request("GET" if body is None else "POST", path, body, {**kind, **(headers or {})})
            answer = link.getresponse()
            return answer.status, answer.read().decode()
        finally:
            link.close()

    def ask(self, model: str, prompt: str, **fields: Any) -> Any:
        """The answer of /v1/chat/completions."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": HOLD,
            **fields,
        }
        status, text = self.send("/v1/chat/completions", json.dumps(body).encode())
        assert status == 200, text
        return json.loads(text)

    def refused(self, status: int, fields: Any, path: str = "/v1/chat/completions", **more: Any) -> str:
        """The message of the error, after checking its form."""
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        got, text = self.send(path, body, **more)
        assert got == status, text
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in text
        assert "\n" not in error["message"]
        return error["message"]

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=30)
        return self.process.returncode, rest


def said(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


def generated(base: Path, name: str, prompt: str, max_tokens: int = HOLD) -> str:
    """What `mlx-adapters generate` prints."""
    adapter = [] if name == base.name else ["--adapter", str(base.parent / name)]
    command = ["generate", str(base), "--prompt", prompt, "--max-tokens", str(max_tokens), *adapter]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.stdout.removesuffix("\n")
