"""Every command block of README.md, CONTRIBUTING.md and docs/ is run, page by page, or says why not.

A page's blocks run in order in one folder, as a reader would type them, with tiny models in the place of
those the page names and a local hub. A block under `<!-- not run: why -->` is skipped with that reason.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_hub import Hub
from tiny import make_tiny
from trained import make_adapter

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
_BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<why>[^\n]*?) -->\n)?^(?P<indent>[ ]*)```(?P<kind>\w*)\n(?P<text>.*?)^[ ]*```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """`why` is what the comment above says, if there is one."""

    page: Path
    number: int
    kind: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


def blocks(page: Path) -> list[Block]:
    whole = page.read_text()
    found = [
        Block(page, whole[: m.start("text")].count("\n"), m["kind"], textwrap.dedent(m["text"]), m["why"])
        for m in _BLOCK.finditer(whole)
    ]
    return [block for block in found if block.kind in ("bash", "python")]


ALL = [block for page in PAGES for block in blocks(page)]
SKIPPED = [block for block in ALL if block.why is not None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 4-bit groups have 64 columns
    root = tmp_path_factory.mktemp("docs")
    return make_tiny("qwen2", root, hidden_size=64, intermediate_size=128)


def workspace(folder: Path, tiny: Path) -> None:
    """What a page takes for granted."""
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("model", "MODEL", "quickstart/model"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tiny)
    rows = [{"instruction": f"Tom has {n} apples", "output": f"the answer is {n}"} for n in range(8)]
    for name in ("my.jsonl", "train.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"instruction": "how many ?", "answer": "3"}) + "\n")
    for name, answer in (("gsm8k", "3"), ("SVAMP", "3"), ("boolq", "true")):
        (folder / "dataset" / name).mkdir(parents=True)
        item = {"instruction": "how many ?", "input": "", "output": answer, "answer": answer}
        (folder / "dataset" / name / "test.json").write_text(json.dumps([item] * 3))


def environment(folder: Path, hub: Hub) -> dict[str, str]:
    """The commands on PATH, and the local hub."""
    commands = folder.parent / "bin"
    commands.mkdir()
    python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    ours = f'#!/bin/sh\nexec "{sys.executable}" -m mlx_adapters.cli.app "$@"\n'
    for name, text in (("python", python), ("mlx-adapters", ours)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "home"),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page(page: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    workspace(folder, tiny)
    if page.name == "hand-over.md":
        make_adapter(tiny, folder / "my-adapter", "lora", {"rank": 4}, seed=1)
    hub = Hub(tiny, tmp_path)
    env = environment(folder, hub)
    try:
        for block in blocks(page):
            if block.why is not None:
                continue
            script = folder.parent / f"block.{block.kind}"
            script.write_text(("set -euo pipefail\n" if block.kind == "bash" else "") + block.text)
            program = ["bash", str(script)] if block.kind == "bash" else [sys.executable, str(script)]
            done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{block}\n{block.text}\n{done.stdout}\n{done.stderr}"
    finally:
        hub.server.shutdown()
        hub.server.server_close()


@pytest.mark.parametrize("block", SKIPPED, ids=str)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert block.why
    assert block.why.startswith("not run: "), f"{block}: write <!-- not run: REASON -->"
    assert len(block.why) > 20
    pytest.skip(block.why)


def test_blocks_are_found() -> None:
    """A fence the pattern misses would never be run."""
    for page in PAGES:
        fences = len(re.findall(r"^[ ]*```(?:bash|python)$", page.read_text(), re.M))
        assert len(blocks(page)) == fences, page
    assert len(ALL) > 25
    assert len(SKIPPED) < len(ALL) / 3


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), (page, target)


def test_the_page_of_commands_is_the_help() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import commands
    finally:
        sys.path.pop(0)
    assert commands.PAGE.read_text() == commands.text(), "run: python docs/commands.py"


def test_the_site_builds(tmp_path: Path) -> None:
    if not (find_spec("mkdocs") and find_spec("material") and find_spec("mkdocstrings")):
        pytest.skip("the extra docs (mkdocs-material) is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "api.html").read_text()
    assert "mlx_adapters.model.load" in page
