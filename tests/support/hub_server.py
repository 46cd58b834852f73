"""A local server that speaks the hub's download protocol, and can be down, slow or wrong."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "owner/tiny"


WEIGHTS = "model.safetensors"


COMMITS = {"main": "1" * 40, "v1": "2" * 40}


class _Hub(BaseHTTPRequestHandler):
    """Serves `folder`. `api` and `files` are the statuses of the two parts; the rest provokes the faults."""

    protocol_version = "HTTP/1.1"
    folder: Path
    api = 200
    files = 200
    cut = 0  # how many of the coming downloads of the weights end half way
    wait = 0.0  # seconds before every answer
    got: list[tuple[str, str, str | None]]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):
            return self._file(send=True)
        kind = type(self)
        kind.got.append(("API", self.path, None))
        time.sleep(self.wait)
        names = [file.name for file in self.folder.iterdir() if file.is_file()]
        revision = self.path.partition("/revision/")[2].partition("?")[0] or "main"
        tree = self.path.partition("/tree/")[2].partition("?")[0]
        commit = COMMITS.get(revision) or (revision if revision in COMMITS.values() else None)
        if self.api != 200:
            return self._json(self.api, {"error": "no"})
        if tree:
            sizes = [(name, (self.folder / name).stat().st_size) for name in names]
            rows = [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes]
            return self._json(200, rows)
        if commit is None:
            return self._json(404, {"error": "no"}, **{"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in names]
        return self._json(200, {"id": REPO, "sha": commit, "siblings": siblings})

    def _file(self, *, send: bool) -> None:
        kind = type(self)
        _, _, rest = self.path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        kind.got.append((self.command, self.path, self.headers.get("Range")))
        time.sleep(self.wait)
        if self.files != 200:
            return self._json(self.files, {"error": "no"})
        if not (self.folder / name).is_file():
            return self._json(404, {"error": "no"}, **{"X-Error-Code": "EntryNotFound"})
        whole = (self.folder / name).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        body = whole[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMITS.get(commit, commit))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not send:
            return
        if name == WEIGHTS and kind.cut:
            kind.cut -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _json(self, status: int, value: Any, **headers: str) -> None:
        body = b"" if self.command == "HEAD" else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)


class Hub:
    """The server, and commands that use it with a cache of their own."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.kind = type("Kind", (_Hub,), {"folder": folder, "got": []})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.kind)
        self.server.daemon_threads = True
        self.root = root
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment must say to use it."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(self.root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_TOKEN": "hf_mustNotShow0123456789",
        }

    def convert(self, name: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_adapters.cli.app", "convert", REPO, str(self.root / name)]
        done = subprocess.run(
            [*command, *options],
            env={**os.environ, **self.environment, **env},
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert "hf_mustNotShow" not in done.stdout + done.stderr
        return done

    def fails(self, *options: str, **env: str) -> str:
        """The one line of a failing download."""
        done = self.convert("out", *options, **env)
        assert done.returncode == 2, done.stderr
        assert not (self.root / "out").exists()
        # before it the client may draw its bar and tell of retries
        lines = done.stderr.rstrip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
        assert "Traceback" not in done.stderr
        assert lines[-1].startswith(f"error: {REPO}: ")
        return lines[-1]
