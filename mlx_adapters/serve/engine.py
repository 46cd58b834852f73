"""The one thread that owns the model: it answers requests in turns, each under its own adapter.

MLX's arrays belong to the thread that made them, so `run` is called where the model was loaded, and HTTP
threads only hand in requests and read queues. Each request keeps its own cache and is decoded alone, by the
calls of `mlx-adapters generate`: rows in one batch would differ from it in the last bits. A turn is a few
tokens long, and turns go round, so a long answer does not hold back a short one.
"""

import queue
import threading
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import start_cache, with_virtual
from mlx_adapters.adapter.multi import activate, active
from mlx_adapters.cpu import threads
from mlx_adapters.data.templates import wanted_template
from mlx_adapters.errors import AdaptersError, DataError
from mlx_adapters.files.documents import json_option
from mlx_adapters.generate.sampling import fresh_seed, penalties, sampler
from mlx_adapters.generate.stream import Delta, stream_tokens
from mlx_adapters.generate.text import Question, render, way_of
from mlx_adapters.models.limits import made_for
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.serve.requests import CompletionRequest, RequestError

__all__ = ["Engine", "Stream"]

_TURN = 8  # tokens; switching costs about as much as a small fraction of one


@dataclass(eq=False)
class Stream:
    """An answer in progress. The HTTP thread reads `deltas`, of which the last has a reason and the number
    of the prompt's tokens; setting `cancelled` ends the answer early."""

    request: CompletionRequest
    deltas: "queue.SimpleQueue[Delta | RequestError]" = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    steps: Generator[Delta] | None = None
    prompt_tokens: int = 0
    pending: str = ""  # text that may be the beginning of a stop text


class Engine:
    """One base and its adapters, answering. `name` is the base's; adapters have those of `metas`.

    `template` and `chat_template_kwargs` count for all of them, as in `generate`; the variables of a request
    win. Raises ConfigError where they cannot be used.
    """

    def __init__(
        self,
        loaded: LanguageModel,
        metas: Mapping[str, AdapterMeta],
        *,
        name: str,
        parallel: int = 8,
        waiting: int = 64,
        template: str | None = None,
        chat_template_kwargs: str | Mapping[str, Any] | None = None,
    ) -> None:
        loaded.model.eval()
        self.template, self.kwargs = (
            wanted_template(template),
            json_option(chat_template_kwargs, "chat_template_kwargs"),
        )
        self.loaded, self.metas, self.name, self.parallel = loaded, dict(metas), name, parallel
        self._check_templates()
        self.context = made_for(loaded.config)
        self._new: queue.Queue[Stream] = queue.Queue(maxsize=waiting)
        self._streams: deque[Stream] = deque()
        self._stop = threading.Event()

    def _check_templates(self) -> None:
        """Say what is wrong before somebody asks, unless one of the models can be asked so."""
        problems = []
        for adapter in (None, *self.metas.values()):
            try:
                way_of(self.loaded, adapter, self.template, self.kwargs).on(self.loaded.tokenizer)
                return
            except AdaptersError as error:
                problems.append(error)
        raise problems[-1]

    @property
    def models(self) -> list[str]:
        """What a request may name."""
        return [self.name, *self.metas]

    def submit(self, request: CompletionRequest) -> Stream:
        """Hand in a request, from any thread. RequestError for an unknown model or when too many wait."""
        if request.model not in self.models:
            raise RequestError(
                404,
                f"no model {request.model[:80]!r}; there are {', '.join(self.models)}",
                "model",
                "model_not_found",
            )
        stream = Stream(request)
        try:
            if self._stop.is_set():
                raise RequestError(503, "the server is stopping")
            self._new.put_nowait(stream)
        except queue.Full:
            raise RequestError(429, f"{self._new.maxsize} requests wait already: try again later") from None
        if self._stop.is_set():  # it stopped in between: nobody would read the queue again
            self._drop()
        return stream

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
                if self._streams:
                    self._turn(self._streams.popleft())
        finally:
            self._stop.set()
            for stream in self._streams:
                self._close(stream)
                stream.deltas.put(RequestError(503, "the server is stopping"))
            self._streams.clear()
            self._drop()

    def _drop(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._new.get_nowait().deltas.put(RequestError(503, "the server is stopping"))

    def _take(self) -> None:
        """Let new requests in, the longest waiting first; wait for one when there is nothing to do."""
        with suppress(queue.Empty):
            while len(self._streams) < self.parallel:
                self._streams.append(self._new.get_nowait() if self._streams else self._new.get(timeout=0.1))

    def _turn(self, stream: Stream) -> None:
        """A few tokens of one answer; then it goes to the end of the line."""
        threads.keep_up()
        try:
            done = stream.cancelled or self._advance(stream)
        except RequestError as error:
            stream.deltas.put(error)
            done = True
        except AdaptersError as error:
            stream.deltas.put(RequestError(400, " ".join(str(error).split())))
            done = True
        except Exception as error:  # one request must not end the others'
            stream.deltas.put(RequestError(500, f"the answer failed ({type(error).__name__}: {error})"))
            done = True
        if done:
            self._close(stream)
        else:
            self._streams.append(stream)

    def _advance(self, stream: Stream) -> bool:
        name = None if stream.request.model == self.name else stream.request.model
        model = self.loaded.model
        if self.metas and active(model) != ((name,) if name else ()):
            activate(model, name)
        if stream.steps is None:
            stream.steps = self._start(stream)
        return any(self._pass_on(stream, next(stream.steps)) for _ in range(_TURN))

    def _start(self, stream: Stream) -> Generator[Delta]:
        model, request = self.loaded.model, stream.request
        question = self._question(request)
        ids, tokenizer = question.ids, question.tokenizer
        if not ids:
            raise RequestError(400, "the prompt has no tokens")
        row = with_virtual(model, ids, tokenizer)
        cache = start_cache(model)
        front = int(getattr(cache[0], "offset", 0)) if cache else 0
        if self.context and front + len(row) + request.max_tokens > self.context:
            raise RequestError(
                400,
                f"the model reads at most {self.context} tokens, found {front + len(row)} of the prompt and "
                f"{request.max_tokens} of max_tokens",
                code="context_length_exceeded",
            )
        stream.prompt_tokens = len(row)
        return stream_tokens(
            model,
            tokenizer,
            row,
            prompt=ids,
            max_tokens=request.max_tokens,
            sampler=sampler(
                fresh_seed() if request.seed is None else request.seed,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
            ),
            processors=penalties(
                ids,
                len(row),
                repetition=request.repetition_penalty,
                presence=request.presence_penalty,
                frequency=request.frequency_penalty,
            ),
            cache=cache,
        )

    def _question(self, request: CompletionRequest) -> Question:
        """The prompt: as it is, or a conversation through the adapter's template (else the chat template)."""
        adapter = self.metas.get(request.model)
        if request.prompt is not None:
            way = way_of(self.loaded, adapter)
            return Question(request.prompt, "plain", way.on(self.loaded.tokenizer))
        try:
            return render(
                self.loaded,
                request.messages,
                adapter=adapter,
                template=self.template,
                chat_template_kwargs={**self.kwargs, **request.template_kwargs},
            )
        except DataError as error:
            raise RequestError(400, " ".join(str(error).split()), "messages") from None

    def _pass_on(self, stream: Stream, delta: Delta) -> bool:
        """Pass on what was decoded, up to a stop text; True when that was all."""
        text, last = stream.pending + delta.text, delta.reason is not None
        cuts = [at for stop in stream.request.stop if (at := text.find(stop)) >= 0]
        reason = "stop" if cuts else delta.reason
        if cuts:
            text = text[: min(cuts)]
        keep = 0 if cuts or last else _begun(text, stream.request.stop)
        stream.pending = text[len(text) - keep :]
        text = text[: len(text) - keep]
        if reason:
            stream.deltas.put(Delta(text, delta.tokens, reason, stream.prompt_tokens))
        elif text:
            stream.deltas.put(Delta(text))
        return reason is not None

    def _close(self, stream: Stream) -> None:
        """Free the cache of a request at once."""
        if stream.steps is not None:
            stream.steps.close()
        stream.steps = None


def _begun(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
