"""`mlx-adapters chat --web`: the page answers as `generate` does, in code and in a headless browser."""

import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import HOLD, METHODS, PROMPTS
from typer.testing import CliRunner

from mlx_adapters.adapter.multi import load_adapters
from mlx_adapters.cli.app import app
from mlx_adapters.generate.config import AnswerConfig
from mlx_adapters.models.load import load
from mlx_adapters.serve.engine import Engine
from mlx_adapters.serve.page import answer, build, side_by_side
from mlx_adapters.serve.requests import CompletionRequest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
Expected = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    """An engine whose arrays belong to a thread of its own, as the page's do to the command's."""
    ready: queue.Queue[Engine] = queue.Queue()

    def work() -> None:
        loaded = load(base, answering=True)
        made = Engine(
            loaded, load_adapters(loaded, {name: base.parent / name for name in METHODS}), name="base"
        )
        ready.put(made)
        made.run()

    thread = threading.Thread(target=work)
    thread.start()
    made = ready.get(timeout=60)
    yield made
    made.stop()
    thread.join(timeout=30)


def ask(model: str, text: str, **fields: Any) -> CompletionRequest:
    return CompletionRequest(
        model=model, messages=({"role": "user", "content": text},), max_tokens=HOLD, **fields
    )


def test_answers_grow_to_what_generate_prints(engine: Engine, base: Path, expected: Expected) -> None:
    for model in engine.models:
        seen = list(answer(engine, ask(model, PROMPTS[0])))
        assert seen[-1] == expected[base.name if model == "base" else model, PROMPTS[0]]
        assert all(later.startswith(earlier) for earlier, later in pairwise(seen))


def test_side_by_side_is_one_by_one(engine: Engine, base: Path, expected: Expected) -> None:
    last = list(side_by_side(engine, [ask(model, PROMPTS[1]) for model in engine.models]))[-1]
    assert last == [expected[base.name if model == "base" else model, PROMPTS[1]] for model in engine.models]
    assert len(set(last)) > 1  # adapters that all answer alike would show nothing


def test_an_error_is_a_line_of_the_page(engine: Engine) -> None:
    assert list(answer(engine, ask("nobody", "a")))[-1].startswith("error: no model 'nobody'")
    long = CompletionRequest(model="base", messages=({"role": "user", "content": "a"},), max_tokens=10**9)
    assert "the model reads at most" in list(answer(engine, long))[-1]


def test_leaving_early_ends_the_request(engine: Engine) -> None:
    stream = answer(
        engine,
        CompletionRequest(model="base", messages=({"role": "user", "content": "tom"},), max_tokens=90_000),
    )
    assert next(stream) is not None
    stream.close()  # type: ignore[attr-defined]
    assert list(answer(engine, ask("base", PROMPTS[2])))  # the engine is free again
    for _ in range(100):
        if not engine._streams:
            break
        list(answer(engine, ask("base", PROMPTS[2])))
    assert not engine._streams


def test_the_page_has_every_adapter(engine: Engine) -> None:
    pytest.importorskip("gradio", reason="the extra web is not installed")
    page = build(engine, title="t", config=AnswerConfig(max_tokens=HOLD, seed=0))
    found = [block for block in page.config["components"] if block["props"].get("elem_id") == "model"]
    assert [choice[0] for choice in found[0]["props"]["choices"]] == engine.models
    labels = [block["props"].get("label") for block in page.config["components"]]
    assert [name for name in engine.models if name not in labels] == []


def chat(base: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["chat", str(base), "--web", *options])


def test_what_it_refuses(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = chat(base, "--template", "alpca")
    assert (result.exit_code, "Unknown template 'alpca'" in result.stderr) == (2, True)
    shutil.copytree(base.parent / "lora", tmp_path / "base")
    result = chat(base, "--adapter", str(tmp_path / "base"))
    assert (
        result.exit_code,
        "two models would be named base: give --adapter OTHERNAME=" in result.stderr,
    ) == (2, True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gradio", None)
        result = chat(base)
        assert result.exit_code == 2
        assert result.stderr.strip() == 'error: the page needs Gradio: pip install "mlx-adapters[web]"'
    pytest.importorskip("gradio", reason="the extra web is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = chat(base, "--port", str(taken.getsockname()[1]))
        assert result.exit_code == 2
        assert "is taken: give another with --port" in result.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser(base: Path, expected: Expected) -> None:
    """Chat with two adapters, all side by side; nothing is asked of any other machine."""
    pytest.importorskip("gradio", reason="the extra web is not installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_adapters.cli.app", "chat", str(base), "--web", "--port", str(port)]
    command += [
        "--max-tokens",
        str(HOLD),
        *(part for name in METHODS for part in ("--adapter", str(base.parent / name))),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        line = next(line for line in process.stderr if "Ctrl-C stops" in line)
        assert "answers as base, lora, prefix, prompt" in line
        with driver.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://127.0.0.1:{port}")
            for name, text in (("lora", PROMPTS[0]), ("prefix", PROMPTS[1])):
                page.get_by_role("button", name="New").click()
                page.locator("#model input").click()
                page.get_by_role("option", name=name).click()
                page.locator("#say textarea").fill(text)
                page.locator("#say textarea").press("Enter")
                said = page.locator("#talk .bot.message").last
                driver.expect(said).to_contain_text(expected[name, text].strip()[-12:], timeout=20_000)
            page.get_by_role("tab", name="Compare").click()
            page.locator("#ask textarea").fill(PROMPTS[2])
            page.locator("#compare").click()
            for number, name in enumerate([base.name, *METHODS]):
                box = page.locator(f"#answer-{number} textarea")
                driver.expect(box).to_have_value(expected[name, PROMPTS[2]], timeout=20_000)
            outside = [
                url for url in asked if not url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:"))
            ]
            assert outside == []
            browser.close()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
