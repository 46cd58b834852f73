"""Ask a model one question: `generate` returns the answer, `stream` yields it as it is written.

The prompt of a question is made here alone, for the command line, the chat and the server: `render` writes it
with the one rule for the template, and `Prompt` holds what the model reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.adapter import AdapterMeta
from mlx_adapters.adapter.call import before_text, start_cache, with_virtual
from mlx_adapters.data.templates import Asked, asked, conversation
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import ConfigError
from mlx_adapters.generate.sampling import Sampler, fresh_seed, sampler
from mlx_adapters.generate.stream import Delta, stream_tokens
from mlx_adapters.generate.using import fetched, meta_of, opened, using
from mlx_adapters.models.limits import check_length
from mlx_adapters.models.load import LanguageModel
from mlx_adapters.models.own_template import ChatTemplate

__all__ = ["Answer", "Message", "Prompt", "Question", "generate", "prompt_of", "render", "stream", "way_of"]

Message = Mapping[str, str]
"""A turn of a conversation: `role` (system, user or assistant) and `content`."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids: those of its text, and the row with virtual tokens that the model reads."""

    ids: list[int]
    row: list[int]


@dataclass(frozen=True)
class Question:
    """The text of a prompt, the template that wrote it, and the tokenizer to read it with, which also ends
    the answer: where the chat template closes a turn."""

    text: str
    template: str
    tokenizer: Any

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return prompt_ids(self.text, self.tokenizer)


def render(
    loaded: LanguageModel,
    messages: Sequence[Message],
    *,
    adapter: AdapterMeta | None = None,
    template: str | ChatTemplate | None = None,
    chat_template_kwargs: str | Mapping[str, Any] | None = None,
) -> Question:
    """The prompt of a conversation, up to where the answer begins; the rest is as in `way_of`."""
    found = way_of(loaded, adapter, template, chat_template_kwargs)
    tokenizer = found.on(loaded.tokenizer)
    text = conversation(messages, template=found.template, tokenizer=tokenizer)
    return Question(text, found.template, tokenizer)


def way_of(
    loaded: LanguageModel,
    adapter: AdapterMeta | None = None,
    template: str | ChatTemplate | None = None,
    chat_template_kwargs: str | Mapping[str, Any] | None = None,
) -> Asked:
    """How questions are written.

    The template is the one asked for, a name or a file, else the adapter's, else that of an adapter fused
    into the model, else `chat` where the tokenizer has a chat template, else `plain`. The chat template and
    its variables are those that the adapter was trained with; `chat_template_kwargs` win over them.
    """
    of_adapter = [(adapter.template, adapter.chat)] if adapter else []
    known = (*of_adapter, (loaded.template, loaded.chat))
    return asked(template, chat_template_kwargs, *known, tokenizer=loaded.tokenizer)


def prompt_of(loaded: LanguageModel, ids: list[int], max_tokens: int) -> Prompt:
    """The prompt of a text's tokens. Raises UnsupportedError where it and the answer are longer than the
    model's positions."""
    row = with_virtual(loaded.model, ids, loaded.tokenizer)
    check_length(loaded.model, len(ids) + before_text(loaded.model), max_tokens)
    return Prompt(ids, row)


class Answer:
    """An answer as it is written: iterate once, over pieces of its text.

    Attributes:
        template: the template of the prompt.
        prompt_tokens: tokens of the prompt's text.
        text: what has been written so far.
        tokens: tokens written so far, the stop token included.
        finish_reason: `stop` or `length` at the end, None before.
    """

    def __init__(self, deltas: Iterator[Delta], *, template: str, prompt_tokens: int) -> None:
        self.template, self.prompt_tokens = template, prompt_tokens
        self.text, self.tokens = "", 0
        self.finish_reason: str | None = None
        self._deltas = deltas

    def __iter__(self) -> Iterator[str]:
        for delta in self._deltas:
            self.text += delta.text
            self.tokens, self.finish_reason = delta.tokens, delta.reason
            yield delta.text


def stream(
    model: LanguageModel | str | Path,
    prompt: str | Sequence[Message],
    *,
    adapter: str | Path | None = None,
    system: str | None = None,
    template: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    chat_template_kwargs: str | Mapping[str, Any] | None = None,
) -> Answer:
    """Answer a prompt piece by piece.

        for piece in stream(model, "How do I change my password?", adapter="desk"):
            print(piece, end="", flush=True)

    Mistakes in the arguments are raised at once. The adapter stays active until the last piece is read.

    Args:
        model: a loaded model, a model folder or a hub id.
        prompt: the instruction, or a conversation that ends with the user's turn.
        adapter: an adapter folder, a hub id, or the name of one that is loaded. None: the model as it is.
        system: a system message in front of the prompt.
        template: the prompt template, or a file with a chat template; by default the adapter's, else `chat`
            where the tokenizer has a chat template, else `plain`.
        max_tokens: the longest answer.
        temperature: 0 takes the most likely token; higher values draw more evenly.
        top_p: draw from the fewest tokens that together have this probability.
        top_k: draw from that many of the likeliest tokens; 0: from all.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
        seed: makes draws repeatable; None: new draws each time.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}; they win
            over those that the adapter was trained with.

    Returns:
        An iterable of text that also knows the template and the number of tokens.

    Raises:
        ConfigError, AdapterError, UnsupportedError: as `generate` raises them.
    """
    loaded = opened(model)
    adapter = fetched(loaded, adapter)
    meta = meta_of(loaded, adapter)
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    question = render(
        loaded, turns, adapter=meta, template=template, chat_template_kwargs=chat_template_kwargs
    )
    if not (ids := question.ids):
        raise ConfigError("the prompt is empty: give the instruction to answer")
    seed = fresh_seed() if seed is None else seed
    draw = sampler(seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)

    deltas = _deltas(loaded, adapter, question.tokenizer, ids, max_tokens, draw)
    return Answer(deltas, template=question.template, prompt_tokens=len(ids))


def _deltas(
    loaded: LanguageModel,
    adapter: str | Path | None,
    tokenizer: Any,
    ids: list[int],
    max_tokens: int,
    draw: Sampler,
) -> Iterator[Delta]:
    """The answer to the text of `ids`, whose adapter is active until the last piece is read."""
    with using(loaded, adapter):
        training = loaded.model.training
        loaded.model.eval()  # adapter dropout would make the answer random
        prompt = prompt_of(loaded, ids, max_tokens)
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": draw}
        options["cache"] = start_cache(loaded.model)
        try:
            yield from stream_tokens(loaded.model, tokenizer, prompt.row, prompt=prompt.ids, **options)
        finally:
            loaded.model.train(training)


def generate(
    model: LanguageModel | str | Path,
    prompt: str | Sequence[Message],
    *,
    adapter: str | Path | None = None,
    system: str | None = None,
    template: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    chat_template_kwargs: str | Mapping[str, Any] | None = None,
) -> str:
    """Answer a prompt.

    Args:
        model: a loaded model, a model folder or a hub id.
        prompt: the instruction, or a conversation that ends with the user's turn.
        adapter: an adapter folder, a hub id, or the name of one that is loaded. None: the model as it is.
        system: a system message in front of the prompt.
        template: the prompt template, or a file with a chat template; by default the adapter's, else `chat`
            where the tokenizer has a chat template, else `plain`.
        max_tokens: the longest answer.
        temperature: 0 takes the most likely token; higher values draw more evenly.
        top_p: draw from the fewest tokens that together have this probability.
        top_k: draw from that many of the likeliest tokens; 0: from all.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
        seed: makes draws repeatable; None: new draws each time.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}; they win
            over those that the adapter was trained with.

    Returns: the text of the answer.

    Raises:
        ConfigError: an empty prompt, or an unknown template.
        AdapterError: an adapter that does not fit the model.
        UnsupportedError: a prompt and answer that are longer than the model's positions.
    """
    answer = stream(
        model,
        prompt,
        adapter=adapter,
        system=system,
        template=template,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
    )
    return "".join(answer)
