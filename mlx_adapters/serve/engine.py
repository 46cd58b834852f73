"""The one thread that owns the model: it answers requests in turns, each under its own adapter.

MLX's arrays belong to the thread that made them, so `run` is called where the model was loaded, and HTTP
threads only hand in requests and read queues. Each request keeps its own cache and is decoded alone, by the
calls of `mlx-adapters generate`: rows in one batch would differ from it in the last bits. A turn is a few
tokens long, and turns go round, so a long answer does not hold back a short one.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters import threads
from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import AdaptersError
from mlx_adapters.model import Loaded
from mlx_adapters.serve.requests import Ask, Message, RequestError
from mlx_adapters.several import activate, active
from mlx_adapters.virtual import start_cache, with_virtual

__all__ = ["Engine", "Job", "Piece"]

_TURN = 8  # tokens; switching costs about as much as a small fraction of one


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a reason (`stop`, `length`) and the counts of tokens."""

    text: str
    reason: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(eq=False)
class Job:
    """A request on its way. `pieces` is read by the HTTP thread; setting `cancelled` ends it early."""

    ask: Ask
    pieces: "queue.SimpleQueue[Piece | RequestError]" = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    steps: Iterator[Any] | None = None
    held: str = ""


class Engine:
    """One base and its adapters, answering. `name` is the base's; adapters have those of `metas`."""

    def __init__(
        self,
        loaded: Loaded,
        metas: Mapping[str, AdapterMeta],
        *,
        name: str,
        parallel: int = 8,
        waiting: int = 64,
    ) -> None:
        loaded.model.eval()
        self.loaded, self.metas, self.name, self.parallel = loaded, dict(metas), name, parallel
        self.context: int | None = loaded.config.get("max_position_embeddings")
        self._new: queue.Queue[Job] = queue.Queue(maxsize=waiting)
        self._jobs: deque[Job] = deque()
        self._stop = threading.Event()

    @property
    def models(self) -> list[str]:
        """What a request may name."""
        return [self.name, *self.metas]

    def submit(self, ask: Ask) -> Job:
        """Hand in a request, from any thread. RequestError for an unknown model or when too many wait."""
        if ask.model not in self.models:
            raise RequestError(
                404,
                f"no model {ask.model[:80]!r}; there are {', '.join(self.models)}",
                "model",
                "model_not_found",
            )
        job = Job(ask)
        try:
            if self._stop.is_set():
                raise RequestError(503, "the server is stopping")
            self._new.put_nowait(job)
        except queue.Full:
            raise RequestError(429, f"{self._new.maxsize} requests wait already: try again later") from None
        if self._stop.is_set():  # it stopped in between: nobody would read the queue again
            self._drop()
        return job

    def stop(self) -> None:
        """End `run` after the present turn; what is not answered gets an error.

        Nothing but a flag is set: a signal handler may have interrupted `run` inside the queue's lock.
        """
        self._stop.set()

    def run(self) -> None:
        """Answer until `stop`, in the thread that loaded the model."""
        try:
            while not self._stop.is_set():
                self._take()
                if self._jobs:
                    self._turn(self._jobs.popleft())
        finally:
            self._stop.set()
            for job in self._jobs:
                self._close(job)
                job.pieces.put(RequestError(503, "the server is stopping"))
            self._jobs.clear()
            self._drop()

    def _drop(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._new.get_nowait().pieces.put(RequestError(503, "the server is stopping"))

    def _take(self) -> None:
        """Let new requests in, the longest waiting first; wait for one when there is nothing to do."""
        with suppress(queue.Empty):
            while len(self._jobs) < self.parallel:
                self._jobs.append(self._new.get_nowait() if self._jobs else self._new.get(timeout=0.1))

    def _turn(self, job: Job) -> None:
        """A few tokens of one answer; then it goes to the end of the line."""
        threads.keep_up()
        try:
            done = job.cancelled or self._advance(job)
        except RequestError as error:
            job.pieces.put(error)
            done = True
        except AdaptersError as error:
            job.pieces.put(RequestError(400, " ".join(str(error).split())))
            done = True
        except Exception as error:  # one request must not end the others'
            job.pieces.put(RequestError(500, f"the answer failed ({type(error).__name__}: {error})"))
            done = True
        if done:
            self._close(job)
        else:
            self._jobs.append(job)

    def _advance(self, job: Job) -> bool:
        name = None if job.ask.model == self.name else job.ask.model
        model = self.loaded.model
        if self.metas and active(model) != ((name,) if name else ()):
            activate(model, name)
        if job.steps is None:
            job.steps = self._start(job.ask)
        for _ in range(_TURN):
            piece = next(job.steps)
            if self._give(job, piece):
                return True
        return False

    def _start(self, ask: Ask) -> Iterator[Any]:
        from mlx_lm.generate import stream_generate

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = prompt_ids(self._text(ask), tokenizer)
        if not ids:
            raise RequestError(400, "the prompt has no tokens")
        row = with_virtual(model, ids)
        cache = start_cache(model)
        front = int(getattr(cache[0], "offset", 0)) if cache else 0
        if self.context and front + len(row) + ask.max_tokens > self.context:
            raise RequestError(
                400,
                f"the model reads at most {self.context} tokens, found {front + len(row)} of the prompt and "
                f"{ask.max_tokens} of max_tokens",
                code="context_length_exceeded",
            )
        steps: Iterator[Any] = stream_generate(
            model, tokenizer, row, max_tokens=ask.max_tokens, sampler=_sampler(ask), prompt_cache=cache
        )
        return steps

    def _text(self, ask: Ask) -> str:
        """The prompt: as it is, or a conversation through the adapter's template (else the chat template)."""
        if ask.prompt is not None:
            return ask.prompt
        tokenizer = self.loaded.tokenizer
        meta = self.metas.get(ask.model)
        template = (meta.template if meta else "") or ("chat" if tokenizer.has_chat_template else "plain")
        if template == "chat":
            return _chat(list(ask.messages), tokenizer)
        # the other templates know single questions; what was said before stands in front
        parts = []
        for message in ask.messages:
            if message["role"] == "user":
                parts.append(
                    prompt_for(message["content"], template=template, tokenizer=tokenizer, phase="eval")
                )
            else:
                parts.append(message["content"] + "\n\n")
        return "".join(parts)

    def _give(self, job: Job, piece: Any) -> bool:
        """Pass on what was decoded, up to a stop text; True when that was all."""
        text, last = job.held + piece.text, piece.finish_reason is not None
        cuts = [at for stop in job.ask.stop if (at := text.find(stop)) >= 0]
        reason = "stop" if cuts else piece.finish_reason
        if cuts:
            text = text[: min(cuts)]
        keep = 0 if cuts or last else _begun(text, job.ask.stop)
        job.held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        if reason:
            job.pieces.put(Piece(text, reason, piece.prompt_tokens, piece.generation_tokens))
        elif text:
            job.pieces.put(Piece(text))
        return reason is not None

    def _close(self, job: Job) -> None:
        """Free the cache of a request at once."""
        if job.steps is not None:
            job.steps.close()  # type: ignore[attr-defined]
        job.steps = None


def _begun(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def _chat(messages: list[Message], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    if not tokenizer.has_chat_template:
        raise RequestError(400, "the model has no chat template: ask /v1/completions", "messages")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise RequestError(400, f"the chat template refuses these messages ({error})", "messages") from None
    return text


def _sampler(ask: Ask) -> Any:
    """Draws with a key of its own, so that a seed gives the same answer whatever is decoded beside it."""
    import mlx.core as mx

    if ask.temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    key = mx.random.key(ask.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        scaled = logprobs / ask.temperature
        if ask.top_p < 1:
            order = mx.argsort(-scaled, axis=-1)
            share = mx.softmax(mx.take_along_axis(scaled, order, axis=-1), axis=-1)
            kept = mx.cumsum(share, axis=-1) - share < ask.top_p
            scaled = mx.where(mx.take_along_axis(kept, mx.argsort(order, axis=-1), axis=-1), scaled, -mx.inf)
        return mx.random.categorical(scaled, key=now)

    return sample
