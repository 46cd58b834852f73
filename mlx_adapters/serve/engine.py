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

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import start_cache, with_virtual
from mlx_adapters.adapter.multi import activate, active
from mlx_adapters.cpu import threads
from mlx_adapters.data.templates import chosen_template, conversation
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import AdaptersError, DataError
from mlx_adapters.generate.sampling import fresh_seed, penalties, sampler
from mlx_adapters.generate.stream import Piece as Written
from mlx_adapters.generate.stream import stream
from mlx_adapters.models.limits import made_for
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.serve.requests import Ask, RequestError

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
    steps: Iterator[Written] | None = None
    prompt_tokens: int = 0
    held: str = ""


class Engine:
    """One base and its adapters, answering. `name` is the base's; adapters have those of `metas`."""

    def __init__(
        self,
        loaded: LanguageModel,
        metas: Mapping[str, AdapterMeta],
        *,
        name: str,
        parallel: int = 8,
        waiting: int = 64,
    ) -> None:
        loaded.model.eval()
        self.loaded, self.metas, self.name, self.parallel = loaded, dict(metas), name, parallel
        self.context = made_for(loaded.config)
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
            job.steps = self._start(job)
        for _ in range(_TURN):
            piece = next(job.steps)
            if self._give(job, piece):
                return True
        return False

    def _start(self, job: Job) -> Iterator[Written]:
        model, tokenizer, ask = self.loaded.model, self.loaded.tokenizer, job.ask
        ids = prompt_ids(self._text(ask), tokenizer)
        if not ids:
            raise RequestError(400, "the prompt has no tokens")
        row = with_virtual(model, ids, tokenizer)
        cache = start_cache(model)
        front = int(getattr(cache[0], "offset", 0)) if cache else 0
        if self.context and front + len(row) + ask.max_tokens > self.context:
            raise RequestError(
                400,
                f"the model reads at most {self.context} tokens, found {front + len(row)} of the prompt and "
                f"{ask.max_tokens} of max_tokens",
                code="context_length_exceeded",
            )
        job.prompt_tokens = len(row)
        return stream(
            model,
            tokenizer,
            row,
            prompt=ids,
            max_tokens=ask.max_tokens,
            sampler=sampler(
                fresh_seed() if ask.seed is None else ask.seed,
                temperature=ask.temperature,
                top_p=ask.top_p,
                top_k=ask.top_k,
                min_p=ask.min_p,
            ),
            processors=penalties(
                ids,
                len(row),
                repetition=ask.repetition_penalty,
                presence=ask.presence_penalty,
                frequency=ask.frequency_penalty,
            ),
            cache=cache,
        )

    def _text(self, ask: Ask) -> str:
        """The prompt: as it is, or a conversation through the adapter's template (else the chat template)."""
        if ask.prompt is not None:
            return ask.prompt
        tokenizer, meta = self.loaded.tokenizer, self.metas.get(ask.model)
        trained = meta.template if meta else None
        template = chosen_template(trained, self.loaded.template, tokenizer=tokenizer)
        try:
            return conversation(
                ask.messages, template=template, tokenizer=tokenizer, kwargs=ask.template_kwargs
            )
        except DataError as error:
            raise RequestError(400, " ".join(str(error).split()), "messages") from None

    def _give(self, job: Job, piece: Written) -> bool:
        """Pass on what was decoded, up to a stop text; True when that was all."""
        text, last = job.held + piece.text, piece.reason is not None
        cuts = [at for stop in job.ask.stop if (at := text.find(stop)) >= 0]
        reason = "stop" if cuts else piece.reason
        if cuts:
            text = text[: min(cuts)]
        keep = 0 if cuts or last else _begun(text, job.ask.stop)
        job.held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        if reason:
            job.pieces.put(Piece(text, reason, job.prompt_tokens, piece.tokens))
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
