"""The web page of `mlx-adapters chat --web`: a conversation, and base and adapters side by side (Gradio).

Questions go through the engine of `serve`, so the page answers as the server and `generate` do. Nothing is
shared or sent: Gradio's tunnel and its statistics are off.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_adapters.errors import ConfigError, UnsupportedError
from mlx_adapters.generate.config import AnswerConfig
from mlx_adapters.serve.engine import Engine
from mlx_adapters.serve.requests import CompletionRequest, Message, RequestError

__all__ = ["answer", "build", "opened", "side_by_side"]

Turns = list[dict[str, Any]]

_CSS = """
.gradio-container {max-width: 1100px !important; margin: 0 auto !important}
.answers {flex-wrap: wrap}
.answers > * {min-width: min(320px, 100%) !important}
"""


def answer(engine: Engine, request: CompletionRequest) -> Iterator[str]:
    """The answer so far, again and again as it grows; an error is the answer's last line.

    Leaving the iterator early ends the request.
    """
    text = ""
    try:
        stream = engine.submit(request)
    except RequestError as error:
        yield f"error: {error}"
        return
    try:
        while True:
            delta = stream.deltas.get()
            if isinstance(delta, RequestError):
                yield f"{text}\n\nerror: {delta}".strip()
                return
            text += delta.text
            yield text
            if delta.reason:
                return
    finally:
        stream.cancelled = True


def side_by_side(engine: Engine, requests: list[CompletionRequest]) -> Iterator[list[str]]:
    """All answers so far, one list per step; the engine writes them in turns."""
    streams = [answer(engine, request) for request in requests]
    texts, unfinished = [""] * len(requests), set(range(len(requests)))
    try:
        while unfinished:
            for index in sorted(unfinished):
                try:
                    texts[index] = next(streams[index])
                except StopIteration:
                    unfinished.discard(index)
            yield list(texts)
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Questions:
    """What the page's controls do, and the settings that every question is asked with."""

    engine: Engine
    config: AnswerConfig

    def requests(
        self, models: list[str], messages: Turns, system: str, limit: float, heat: float
    ) -> list[CompletionRequest]:
        first = [{"role": "system", "content": system}] if system.strip() else []
        messages = [*first, *messages]
        conversation = tuple(Message(role=turn["role"], content=_text(turn["content"])) for turn in messages)
        return [
            CompletionRequest(
                model=model,
                messages=conversation,
                max_tokens=int(limit),
                temperature=float(heat),
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                min_p=self.config.min_p,
                seed=self.config.seed,
            )
            for model in models
        ]

    def chat(
        self, text: str, turns: Turns, model: str, system: str, limit: float, heat: float
    ) -> Iterator[tuple[str, Turns]]:
        if not text.strip():
            yield "", turns
            return
        turns = [*turns, {"role": "user", "content": text}]
        yield "", turns
        (request,) = self.requests([model], turns, system, limit, heat)
        for found in answer(self.engine, request):
            yield "", [*turns, {"role": "assistant", "content": found}]

    def compare(self, text: str, system: str, limit: float, heat: float) -> Iterator[list[str]]:
        models = self.engine.models
        if not text.strip():
            yield [""] * len(models)
            return
        question = [{"role": "user", "content": text}]
        yield from side_by_side(self.engine, self.requests(models, question, system, limit, heat))


def build(engine: Engine, *, title: str, config: AnswerConfig) -> Any:
    """The page as Gradio's Blocks; `config` is what its controls start with, and what every question is asked
    with."""
    gr = _gradio()
    questions, most = _Questions(engine, config), config.max_tokens
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nBase and adapters on this machine. Nothing leaves it.")
        with gr.Row():
            model = gr.Dropdown(engine.models, value=engine.models[-1], label="Answered by", elem_id="model")
            limit = gr.Slider(1, max(1024, most), value=most, step=1, label="Longest answer, tokens")
            heat = gr.Slider(
                0, 2, value=config.temperature, step=0.05, label="Temperature (0: most likely token)"
            )
        system = gr.Textbox(value=config.system or "", label="System message", lines=1, elem_id="system")
        with gr.Tab("Chat"):
            # without "share", which would send the conversation to Hugging Face
            talk = gr.Chatbot(
                label="Conversation", height=420, elem_id="talk", render_markdown=False, buttons=["copy"]
            )
            with gr.Row():
                message = gr.Textbox(
                    show_label=False, placeholder="Write, then Enter", scale=6, elem_id="say", container=False
                )
                stop = gr.Button("Stop", scale=1, min_width=80)
                gr.ClearButton([talk], value="New", scale=1, min_width=80)
            running = message.submit(
                questions.chat, [message, talk, model, system, limit, heat], [message, talk]
            )
            stop.click(None, cancels=[running])
        with gr.Tab("Compare"):
            # one line, or Enter would begin another line instead of sending
            asked = gr.Textbox(label="One question to all, then Enter", lines=1, max_lines=1, elem_id="ask")
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare")
                halt = gr.Button("Stop", elem_id="halt")
            with gr.Row(elem_classes="answers"):
                boxes = [
                    gr.Textbox(label=name, lines=8, interactive=False, elem_id=f"answer-{number}")
                    for number, name in enumerate(engine.models)
                ]
            comparing = gr.on(
                [go.click, asked.submit], questions.compare, [asked, system, limit, heat], boxes
            )
            halt.click(None, cancels=[comparing])
    return page


@contextmanager
def opened(page: Any, *, host: str, port: int) -> Iterator[str]:
    """Inside, the page is served from threads of its own at the address that it yields.

    Raises ConfigError where the port is taken.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=8).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            css=_CSS,
            footer_links=[],
            ssr_mode=False,
            theme=_gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError:
        raise ConfigError(f"port {port} is taken: give another with --port") from None
    try:
        yield str(address)
    finally:
        page.close(verbose=False)


def _text(content: Any) -> str:
    """A message's text: Gradio hands it back as it came or in parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError:
        raise UnsupportedError('the page needs Gradio: pip install "mlx-adapters[web]"') from None
    return gradio
