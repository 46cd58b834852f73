"""A conversation with a model and its adapters: what `chat` holds."""

import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import start_cache, virtual_ids
from mlx_adapters.adapter.multi import activate, active
from mlx_adapters.data.templates import wanted_template
from mlx_adapters.errors import AdaptersError, ConfigError, counted
from mlx_adapters.files.writing import write_json
from mlx_adapters.generate.prefill import Cache
from mlx_adapters.generate.sampling import fresh_seed, sampler
from mlx_adapters.generate.stream import stream_tokens
from mlx_adapters.generate.text import Prompt, Question, prompt_of, render
from mlx_adapters.generate.using import meta_of
from mlx_adapters.models.load import LanguageModel

__all__ = ["HELP", "Conversation"]

HELP = """/adapter NAME   answer with that adapter; /adapter off: the base
/compare        the next message answered by the base and by each adapter
/retry          answer the last message again
/system TEXT    another system message; /system off: none
/temperature X  draw answers at that temperature; 0 takes the most likely token
/reset          forget the conversation
/save FILE      write the conversation as JSON
/help           this
/exit           end, as exit, /quit and Ctrl-D do; Ctrl-C stops an answer
\"\"\"             begins a message of several lines, which ends at the next"""


class Conversation:
    """The turns of a conversation, and the cache of what the model has read of them.

        chat = Conversation(loaded, load_adapters(loaded, {"desk": "desk-adapter"}))
        for piece in chat.ask("How do I change my password?"):
            print(piece, end="")

    Args:
        loaded: the model.
        adapters: those that `load_adapters` has loaded, by name; the first one answers.
        system: a system message in front of the turns.
        template: the prompt template, by default as in `generate`.
        max_tokens: the longest answer.
        temperature: 0 takes the most likely token.
        top_p: draw from the fewest tokens that together have this probability.
        top_k: draw from that many of the likeliest tokens; 0: from all.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
        seed: makes draws repeatable; None: new draws each time.
        chat_template_kwargs: variables of the chat template, as in `generate`.
    """

    def __init__(
        self,
        loaded: LanguageModel,
        adapters: Mapping[str, AdapterMeta] | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        chat_template_kwargs: str | Mapping[str, Any] | None = None,
    ) -> None:
        loaded.model.eval()
        self.loaded, self.adapters = loaded, adapters or {}
        self.template, self.kwargs = wanted_template(template), chat_template_kwargs
        self.max_tokens = max_tokens
        self.system, self._seed = system, fresh_seed() if seed is None else seed
        self._narrowed: dict[str, Any] = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        self.sampler = sampler(self._seed, temperature=temperature, **self._narrowed)
        self.turns: list[dict[str, str]] = []
        self.forget()
        if self.adapters:
            self.use(next(iter(self.adapters)))

    def order(self, line: str) -> str:
        """Do what a line of `HELP` says that brings no answer, and return what to tell the user."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if word == "/system":
                self.system = (None if rest == "off" else rest) if rest else self.system
                return f"system message: {self.system or 'none'}"
            if word == "/temperature":
                return self._heat(rest)
            if word == "/adapter" and rest:
                self.use(None if rest == "off" else rest)
                return f"now: {self.name}"
            if word == "/adapter":
                return f"adapters: {', '.join(self.adapters) or 'none'}; now: {self.name}"
            if word == "/reset":
                self.turns = []
                self.forget()
                return "forgotten"
            if word == "/save" and rest:
                write_json(Path(rest), self.turns)
                return f"{rest}: {counted(len(self.turns), 'turn')}"
        except (AdaptersError, OSError) as error:
            return f"error: {error}"
        return f"unknown command {word}: /help lists them"

    def _heat(self, text: str) -> str:
        try:
            temperature = float(text)
        except ValueError:
            temperature = math.nan
        if not (math.isfinite(temperature) and temperature >= 0):
            return f"error: /temperature {text}: write a number of 0 or more, /temperature 0.7 say"
        self.sampler = sampler(self._seed, temperature=temperature, **self._narrowed)
        return f"temperature: {temperature:g}"

    def forget(self) -> None:
        """Drop the cache, for example because another adapter has filled it."""
        self.cache: Cache | None = None
        self.read: list[int] = []
        self._prefix = 0  # places of the cache that were filled at the start: prefix tuning's

    @property
    def name(self) -> str:
        """Who answers: the adapter, or `base`."""
        return (active(self.loaded.model) or ("base",))[0]

    def use(self, name: str | None) -> None:
        """Let the adapter with that name answer from now on; None: the base model."""
        if self.adapters:
            activate(self.loaded.model, name)
        elif name is not None:
            raise ConfigError(f"no adapter {name!r}: start with --adapter FOLDER")
        self.forget()

    def ask(self, text: str) -> Generator[str]:
        """Add the user's turn, yield the answer piece by piece, and add it too.

        An answer that is left early, by Ctrl-C or by closing the generator, is kept as far as it got; an
        error takes the turn back.
        """
        self.turns.append({"role": "user", "content": text})
        written = ""
        try:
            for piece in self.answer():
                written += piece
                yield piece
        except AdaptersError:
            self.turns.pop()
            raise
        except BaseException:
            self.turns.append({"role": "assistant", "content": written})
            raise
        self.turns.append({"role": "assistant", "content": written})

    def retry(self) -> Generator[str]:
        """Answer the last message again, piece by piece. Raises ConfigError where there is none."""
        asked = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            raise ConfigError("there is no message to answer again yet")
        last = self.turns[asked[-1]]["content"]
        del self.turns[asked[-1] :]
        yield from self.ask(last)

    def compare(self, text: str) -> Iterator[tuple[str, Generator[str]]]:
        """The base's name and answer, then each adapter's, to the same conversation, which stays as it was.

        Each answer must be read, or closed, before the next is asked for.
        """
        before, turns = self.name, self.turns
        for name in [None, *self.adapters]:
            self.use(name)
            self.turns = list(turns)
            yield name or "base", self.ask(text)
        self.turns = turns
        self.use(None if before == "base" else before)

    def answer(self) -> Iterator[str]:
        """Yield an answer to the last turn; the turns stay as they are."""
        question = self.question()
        prompt = prompt_of(self.loaded, question.ids, self.max_tokens)
        unread = self._continue(prompt)
        self.read = prompt.ids
        model, tokenizer = self.loaded.model, question.tokenizer
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "sampler": self.sampler}
        try:
            for delta in stream_tokens(
                model, tokenizer, unread, prompt=prompt.ids, cache=self.cache, **options
            ):
                yield delta.text
        except BaseException:
            self.forget()  # how far the cache got is not known
            raise

    def question(self) -> Question:
        """The prompt of the conversation so far."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return render(
            self.loaded,
            [*system, *self.turns],
            adapter=self.adapters.get(self.name) or meta_of(self.loaded, None),
            template=self.template,
            chat_template_kwargs=self.kwargs,
        )

    def _continue(self, prompt: Prompt) -> list[int]:
        """The tokens that the cache does not have yet; it is cut back to what it shares with the prompt."""
        model, ids = self.loaded.model, prompt.ids
        same = 0
        while same < min(len(self.read), len(ids) - 1) and self.read[same] == ids[same]:
            same += 1
        if self.cache is not None and same and can_trim_prompt_cache(self.cache):
            before = self._prefix + len(virtual_ids(model))
            trim_prompt_cache(self.cache, self.cache[0].offset - before - same)
            if self.cache[0].offset == before + same:
                return ids[same:]
        self.cache = start_cache(model) or make_prompt_cache(model)
        self._prefix = int(self.cache[0].offset) if hasattr(self.cache[0], "offset") else 0
        return prompt.row
