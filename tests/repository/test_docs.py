"""Every command and every piece of Python in README, CONTRIBUTING and docs/ runs, page by page and in order.

A page has a folder of its own, or that of the page it goes on from (`<!-- after: PAGE -->` at its top).
The hub is a server of ours (test_hub.py) that has a tiny model under every id, and the quickstart's embedded
model is a tiny one too, so the blocks are run as they stand. One that cannot be says so right above it:

    <!-- not run: needs several Macs -->      skipped, with the reason
    <!-- slow: half a minute even so -->      run by `pytest -m slow`
"""

import ast
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from embedded import make_embedded
from hub_server import Hub
from tiny import make_tiny

import mlx_adapters as ma
from mlx_adapters.data import wordproblems
from mlx_adapters.evaluate import tasks
from mlx_adapters.evaluate.choices import WORDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))]
RUN = ("bash", "python")
SHOWN = ("text", "json", "yaml")  # what a block may be besides: nothing else, so none escapes
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>[^`]*)")
_MARK = re.compile(r" *<!-- (?P<kind>not run|slow): (?P<reason>.+?) -->")
_AFTER = re.compile(r"<!-- after: (?P<page>\S+) -->")
_LIMIT, _SLOW_LIMIT = 60, 600  # seconds for a block


@dataclass(frozen=True)
class Block:
    """A fenced block. `mark` is `not run`, `slow` or empty."""

    page: str
    line: int
    language: str
    code: str
    mark: str = ""
    reason: str = ""

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """All fenced blocks of `text`, with the mark above."""
    found, lines, start = [], text.splitlines(), None
    for number, line in enumerate(lines):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            continue
        if start is None:
            start, opened = number, fence
            continue
        mark = _MARK.fullmatch(lines[start - 1]) if start else None
        found.append(
            Block(
                page,
                start + 1,
                opened["language"].split(" ")[0],
                textwrap.dedent("\n".join(lines[start + 1 : number])) + "\n",
                mark["kind"] if mark else "",
                mark["reason"] if mark else "",
            )
        )
        start = None
    assert start is None, f"{page}: the block in line {(start or 0) + 1} is never closed"
    return found


TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {page: blocks(page, text) for page, text in TEXTS.items()}


@dataclass
class Reader:
    """Somebody with a folder, a shell and a Python session, who runs a page's blocks one after the other."""

    root: Path
    address: str
    environment: dict[str, str]
    ran: dict[str, str] = field(default_factory=dict)  # block -> what was wrong with it
    here: str = ""  # the page of the Python session
    warm: subprocess.Popen[bytes] | None = None

    def folder(self, page: str) -> Path:
        """Where the page's blocks run; made as the page presumes it."""
        if before := _AFTER.search(TEXTS[page]):
            return self.folder(f"docs/{before['page']}")
        folder = self.root / page.replace("/", "-").removesuffix(".md")
        if not folder.exists():
            folder.mkdir()
            presume(folder, self.root / "model")
            if page == "README.md":
                quickstart(folder, self.root / "model")
        return folder

    def reach(self, block: Block) -> None:
        """Run the block, after all that stand before it."""
        if before := _AFTER.search(TEXTS[block.page]):
            page = f"docs/{before['page']}"
            for earlier in BLOCKS[page]:
                self.once(earlier)
        for earlier in BLOCKS[block.page]:
            if earlier is block:
                break
            self.once(earlier)
        self.once(block, slow=True)

    def once(self, block: Block, *, slow: bool = False) -> None:
        if block.id not in self.ran and block.language in RUN and (block.mark == "" or slow):
            self.ran[block.id] = self.run(block)
        if wrong := self.ran.get(block.id):
            pytest.fail(f"{block.id}\n{block.code}\n{wrong}", pytrace=False)

    def run(self, block: Block) -> str:
        """What was wrong with it; empty if nothing."""
        folder = self.folder(block.page)
        self.start()
        if block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.code]
        else:
            new = [] if self.here == block.page else ["new"]
            self.here = block.page
            asking = "import sys, warm; sys.exit(max(warm.ask(sys.argv[1], w) for w in eval(sys.argv[2])))"
            words = [[one] for one in new] + [["run", block.code, block.id]]
            command = [sys.executable, "-c", asking, self.address, repr(words)]
        given = subprocess.Popen(
            command,
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        limit = _SLOW_LIMIT if block.mark == "slow" else _LIMIT
        try:
            said, _ = given.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(given.pid, signal.SIGKILL)
            self.stop()  # it is at work on the block, and holds its streams
            said, _ = given.communicate()
            return f"not done after {limit} s\n{said}"
        return "" if given.returncode == 0 else f"exit code {given.returncode}\n{said}"

    def start(self) -> None:
        """Start the process that answers (warm.py), unless it is there."""
        if self.warm is not None:
            return
        address = Path(self.address)
        address.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "tests" / "support" / "warm.py"), self.address]
        self.warm = subprocess.Popen(command, env=self.environment, cwd=self.root)
        self.here = ""
        deadline = time.monotonic() + 120
        while not address.exists():
            assert self.warm.poll() is None, "the warm process ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        if self.warm is not None:
            self.warm.kill()
            self.warm.wait()
        self.warm = None


def presume(folder: Path, model: Path) -> None:
    """What a reader has in the folder: the repository's examples, a model, data."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "MODEL").symlink_to(model)
    rows = wordproblems.generate(24, seed=3)
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # for the paper's runs: its training file, and its test sets
    (folder / "math_10k.json").write_text(json.dumps(wordproblems.generate(152, seed=4)), encoding="utf-8")
    for task in tasks.TASKS:
        answer = {"number": "7", "letter": "A"}.get(task.kind) or WORDS[task.kind][0]
        row = {"instruction": "tom has 3 apples", "input": "", "output": answer, "answer": answer}
        (folder / "dataset" / task.name).mkdir(parents=True)
        (folder / "dataset" / task.name / "test.json").write_text(json.dumps([row]), encoding="utf-8")


def quickstart(folder: Path, model: Path) -> None:
    """What the command of that name leaves behind, and the data that README's Python asks for."""
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "model").symlink_to(model)
    output = folder / "quickstart" / "adapter"
    rows = [{"instruction": "How do I change my password?", "output": "Open Settings."}] * 8
    ma.train(ma.load(model), rows, ma.LoRA(), output=output, steps=1)
    lines = [json.dumps(row) for row in rows]
    (folder / "desk.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    root = tmp_path_factory.mktemp("docs")
    # wide and long enough for 4-bit groups and for the templates
    model = make_tiny("qwen2", root, hidden_size=64, max_position_embeddings=1024).rename(root / "model")
    hub = Hub(model, root)
    make_embedded(root / "packages")
    address = str(root / "warm")
    commands = root / "bin"
    commands.mkdir()
    client = f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/support/warm.py --ask {address} cli "$@"\n'
    (commands / "mlx-adapters").write_text(client)
    (commands / "mlx-adapters").chmod(0o755)
    for name in ("python", "python3"):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        **hub.environment,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(root / "packages"), str(ROOT / "tests" / "support")]),
    }
    someone = Reader(root, address, environment)
    someone.start()
    yield someone
    someone.stop()
    hub.server.shutdown()
    hub.server.server_close()


def _runnable() -> list[object]:
    return [
        pytest.param(block, id=block.id, marks=[pytest.mark.slow] if block.mark == "slow" else [])
        for page in PAGES
        for block in BLOCKS[page]
        if block.language in RUN
    ]


@pytest.mark.parametrize("block", _runnable())
def test_a_block_runs(block: Block, reader: Reader) -> None:
    if block.mark == "not run":
        pytest.skip(block.reason)
    reader.reach(block)


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_of_a_known_language_and_a_mark_belongs_to_one(page: str) -> None:
    """No command hides in a fence without a language; no mark stands where nothing is run or in no form."""
    for block in BLOCKS[page]:
        assert block.language in (*RUN, *SHOWN), f"{block.id}: {block.language!r}"
        assert not block.mark or block.language in RUN, f"{block.id}: a mark on what is not run"
        assert not block.mark or len(block.reason.split()) >= 2, f"{block.id}: no reason"
    marks = [line for line in TEXTS[page].splitlines() if re.search(r"<!-- *(not run|slow)", line)]
    assert len(marks) == sum(bool(block.mark) for block in BLOCKS[page]), marks


def test_the_page_on_methods_shows_the_example() -> None:
    """Its Python is the example's, word for word, up to where the reader uses the method."""
    example = (ROOT / "examples" / "02_new_method.py").read_text(encoding="utf-8")
    shown = [block.code for block in BLOCKS["docs/tutorials/new-method.md"] if block.language == "python"]
    *pieces, use, check = shown
    assert len(pieces) == 3
    assert "register" in use
    assert "merge" in check
    for piece in pieces:
        assert piece in example
    definitions = re.findall(r"^(?:class|def) (\w+)", example, re.MULTILINE)
    assert all(
        re.search(rf"^(class|def) {name}\b", "".join(pieces), re.MULTILINE) for name in definitions[:-1]
    )


def test_the_page_on_validation_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", TEXTS["docs/validation.md"]))
    assert len(named) > 20
    assert named <= {file.name for file in (ROOT / "tests").rglob("test_*.py")}


def said(node: ast.AST) -> str:
    """The text of an expression, with `...` for what is filled in; empty where it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(said(part) or "..." for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (said(left) or "...") + (said(right) or "...")
        case _:
            return ""


def test_the_page_on_messages_quotes_the_program() -> None:
    """Each message is there word for word, with `...` where the program fills in."""
    quoted = re.findall(r"^\| `([^`]+)` \|", TEXTS["docs/messages.md"], re.MULTILINE)
    assert len(quoted) > 25
    sources = [
        file for folder in ("mlx_adapters", "convert", "cli") for file in (ROOT / folder).rglob("*.py")
    ]
    codes = [code for file in sources if "Error(" in (code := file.read_text(encoding="utf-8"))]
    trees = [ast.parse(code) for code in codes]
    texts = {text for tree in trees for node in ast.walk(tree) if len(text := said(node)) > 20}
    missing = [one for one in quoted if not any(one in text for text in texts)]
    assert not missing


def prose(page: str) -> str:
    """The page without its blocks."""
    return re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: str) -> set[str]:
    """What `#...` may name on the page, as GitHub and mkdocs both write it."""
    heads = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", head).lower() for head in heads]
    return {re.sub(r"[^\w\s-]", "", head).strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_and_pictures_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        made = ":::" in target.read_text(encoding="utf-8") if target.suffix == ".md" else True
        if anchor and not made:  # mkdocs --strict knows the anchors that are made of docstrings
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{page}: {link}"


def test_every_page_is_in_the_site_s_menu_once() -> None:
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_blocks_are_found_and_marked() -> None:
    text = "a\n\n<!-- not run: needs two Macs -->\n```bash\nx\n```\n\n- b\n\n    ```python\n    y\n    ```\n"
    first, second = blocks("p", text)
    assert (first.line, first.language, first.code, first.mark) == (4, "bash", "x\n", "not run")
    assert first.reason == "needs two Macs"
    assert (second.line, second.language, second.code, second.mark) == (10, "python", "y\n", "")


def test_a_block_that_fails_or_hangs_is_told(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next block has a process to ask again, and another page a Python session of its own."""
    assert "No such file" in reader.run(Block("README.md", 1, "bash", "cat nothing | cat\n"))
    assert "error: MODELL" in reader.run(Block("README.md", 2, "bash", "mlx-adapters info MODELL\n"))
    monkeypatch.setattr(sys.modules[__name__], "_LIMIT", 1)
    assert "not done" in reader.run(Block("README.md", 4, "bash", "echo a; sleep 60\n"))
    assert "not done" in reader.run(Block("README.md", 5, "python", "import time; time.sleep(60)\n"))
    monkeypatch.undo()
    assert reader.run(Block("README.md", 6, "python", "kept = 1\n")) == ""
    assert reader.run(Block("README.md", 7, "python", "kept + 1\n")) == ""
    assert "NameError" in reader.run(Block("docs/index.md", 1, "python", "kept + 1\n"))
    assert "ZeroDivisionError" in reader.run(Block("README.md", 3, "python", "1 / 0\n"))


def test_the_pages_on_commands_and_methods_are_what_the_program_says() -> None:
    pages = runpy.run_path(str(DOCS / "reference.py"))
    for name in ("commands", "methods"):
        assert TEXTS[f"docs/reference/{name}.md"] == pages[name](), "run python docs/reference.py"


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra: pip install -e .[docs]"
)
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > len([page for page in PAGES if page.startswith("docs/")])
    for page, text in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^ >]*", text)
        assert not loaded, (page, loaded)
