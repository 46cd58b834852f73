"""Rows to token ids, and where the supervised part begins."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice
from typing import Any, Protocol

import numpy as np

from mlx_adapters.data.chat import Conversation, closing_token, conversations
from mlx_adapters.data.showing import LOSS_ON
from mlx_adapters.data.sources import Rows, check_fields
from mlx_adapters.data.templates import messages_of, render
from mlx_adapters.errors import ConfigError, DataError, unknown
from mlx_adapters.models.chat_template import Rendered

__all__ = ["SUMMED", "Encoded", "Example", "Sink", "encode", "end_id", "examples_of", "prompt_ids"]

Text = Conversation | tuple[str, str]
"""What an example is made of: a conversation, or a prompt and its completion."""
_TOGETHER = 256  # rows that are encoded together


@dataclass(frozen=True)
class Example:
    """Token `ids`, with labels from index `loss_start` on (at least 1: nothing predicts the first), except in
    the ranges (begin, end) of `unlabelled`: what stands between the answers of a conversation."""

    ids: list[int]
    loss_start: int
    unlabelled: tuple[tuple[int, int], ...] = ()

    @property
    def supervised(self) -> int:
        """How many tokens have a label."""
        return max(0, len(self.ids) - self.loss_start) - sum(end - begin for begin, end in self.unlabelled)

    def as_text(self) -> str:
        """What a run's digest is taken of."""
        return f"{self.loss_start}{self.unlabelled or ''}:{self.ids}"

    def cut(self, length: int) -> "Example":
        """Its first `length` tokens."""
        inside = tuple((begin, min(end, length)) for begin, end in self.unlabelled if begin < length)
        return Example(self.ids[:length], self.loss_start, inside)


class Sink(Protocol):
    """Where `encode` puts the examples: a list, or a file of the token cache."""

    def append(self, example: Example, /) -> object:
        """Take the next one."""

    def __len__(self) -> int:
        """How many it has."""


@dataclass
class Encoded:
    """Examples, and what is odd about the rows: `truncated` were longer than the max length, `dropped` have
    nothing to learn, `empty` have no answer, `rewritten` earlier answers are examples of their own. `longest`
    is the longest row in tokens, whole. `endless`: the tokenizer has no end token. `texts` holds eight bytes
    of a hash of each row's text."""

    examples: Sequence[Example]
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    rewritten: int = 0
    longest: int = 0
    endless: bool = False
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def repeated(self) -> int:
        """How many rows are the same as an earlier one."""
        return len(self.texts) - len(np.unique(self.texts))


SUMMED = ("truncated", "dropped", "empty", "rewritten")
"""The counts of `Encoded` that add up over several sources."""


def end_id(tokenizer: Any) -> int | None:
    """The token that ends an answer: the tokenizer's, else the lowest that the configuration names."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    ends = [id for id in getattr(tokenizer, "eos_token_ids", ()) if id is not None]
    return int(min(ends)) if ends else None


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt. What a chat template wrote is encoded as it is, as transformers does; any other
    text gets the tokenizer's start token, unless it begins with it, and no end token."""
    return _prompts_ids([prompt], tokenizer)[0]


def encode(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str,
    loss_on: str = "completion",
    into: Sink | None = None,
    told: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Encode training rows whole (`long_rows.fitted` cuts them); what ends an answer is learned.

    With the template `chat` a row is a conversation, encoded whole as the chat template writes it. With the
    others prompt and completion are encoded apart: the boundary is then exact whatever the tokenizer merges,
    and the prompt's tokens are those that generation starts from.

    Args:
        rows: what `load_rows` returns.
        tokenizer: the model's.
        template: a name of `TEMPLATES`.
        loss_on: `completion` (all answers of a conversation), `last` (its last answer) or `all` (the prompt
            too, as in the paper).
        into: where the examples go; by default into a list. They are gone through once.
        told: called now and then with the number of rows done so far.

    Raises:
        DataError: a row does not fit the template, or nothing remains to learn.
    """
    if loss_on not in LOSS_ON:
        raise ConfigError(unknown("value of loss-on", loss_on, LOSS_ON))
    kept: list[Example] = []
    sink: Sink = kept if into is None else into
    done, hashes = Encoded(kept, endless=end_id(tokenizer) is None), array("Q")
    numbered = iter(enumerate(rows.rows))
    while some := list(islice(numbered, _TOGETHER)):
        of_rows = []
        for index, row in some:
            try:
                check_fields(row, rows.format)
                of_rows.append(_texts(row, rows.format, template, tokenizer, loss_on))
            except DataError as error:
                raise DataError(f"{rows.origin}: row {index}: {error}") from None
        hashes.extend(_text_hash(texts[-1]) for texts in of_rows)
        done.rewritten += sum(len(texts) - 1 for texts in of_rows)
        every = [text for texts in of_rows for text in texts]
        done.empty += sum(map(_is_empty, every))
        for example in examples_of(every, tokenizer, loss_on):
            done.longest = max(done.longest, len(example.ids))
            _keep(example, done, sink)
        told(len(hashes))
    if not len(sink):
        raise DataError(f"{rows.origin}: no row has a token to learn")
    done.texts = np.frombuffer(hashes, np.uint64) if hashes else done.texts
    return done


def _keep(example: Example, done: Encoded, sink: Sink) -> None:
    if example.supervised > 0:
        sink.append(example)
    else:
        done.dropped += 1


def _text_hash(text: Text) -> int:
    """Eight bytes, by which the texts of rows are told apart."""
    plain = repr(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little")


def _is_empty(text: Text) -> bool:
    return text.empty if isinstance(text, Conversation) else not text[1].strip()


def _texts(row: dict[str, Any], fmt: str, template: str, tokenizer: Any, loss_on: str) -> Sequence[Text]:
    """The training texts of a row: conversations, or its (prompt, completion)."""
    if template != "chat" or fmt == "text":
        return [render(row, fmt, template=template, tokenizer=tokenizer)]
    messages, kwargs = messages_of(row, fmt)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers:
        messages = messages[: answers[-1] + 1]  # what follows the last answer teaches nothing
    only = answers[-1:] if loss_on in ("last", "all") else None
    return conversations(messages, tokenizer, kwargs, only=only)


def examples_of(texts: Sequence[Text], tokenizer: Any, loss_on: str) -> list[Example]:
    """The whole example of each text. All are encoded together: one by one takes three times as long."""
    chats = [text.text for text in texts if isinstance(text, Conversation)]
    pairs = [text for text in texts if not isinstance(text, Conversation)]
    places = iter(_with_places(chats, tokenizer))
    prompts = iter(_prompts_ids([prompt for prompt, _ in pairs if prompt], tokenizer))
    completions = iter(_ids([completion for _, completion in pairs], tokenizer, special=False))
    end, start = end_id(tokenizer), None if all(prompt for prompt, _ in pairs) else _start(tokenizer)
    found = []
    for text in texts:
        if isinstance(text, Conversation):
            found.append(_conversation_example(text, *next(places), tokenizer, loss_on))
            continue
        prompt, completion = text
        if prompt:
            before = next(prompts)
        else:
            before = [] if tokenizer.bos_token and completion.startswith(tokenizer.bos_token) else start or []
        ids = [*before, *next(completions)]
        if end is not None and (len(ids) == len(before) or ids[-1] != end):  # the text may bring its own
            ids.append(end)
        found.append(Example(ids, max(1, 1 if loss_on == "all" else len(before))))
    return found


def _conversation_example(
    text: Conversation, ids: list[int], places: list[tuple[int, int]], tokenizer: Any, loss_on: str
) -> Example:
    """The tokens of a conversation, encoded whole, with labels on the tokens of its answers."""
    spans = iter((*text.learned, (len(text.text) + 1, len(text.text) + 1)))
    begin, end = next(spans)
    labels = []
    for first, last in places:
        while first >= end:
            begin, end = next(spans)
        labels.append(last > begin and first < end)
    end_of_turn, _ = closing_token(tokenizer, tokenizer.chat_template)
    closing = None if text.closed else end_of_turn or end_id(tokenizer)
    if closing is not None and ids[-1] != closing:
        keep = len(labels) - labels[::-1].index(True) if True in labels else len(labels)
        # in place of a line end behind the answer
        ids, labels = [*ids[:keep], closing], [*labels[:keep], True]
    if loss_on == "all":
        return Example(ids, 1)
    runs = [(key, len(list(group))) for key, group in groupby(labels)]
    ends = list(accumulate(count for _, count in runs))
    gaps = [(end - count, end) for (learned, count), end in zip(runs, ends, strict=True) if not learned]
    start = gaps.pop(0)[1] if gaps and gaps[0][0] == 0 else 0
    return Example(ids, max(1, start), tuple(gaps))


def _ids(texts: list[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """The token ids of each text, with what the tokenizer puts around it or without."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if len(texts) > 1 and getattr(inner, "is_fast", False):
        return list(inner(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"])
    return [list(tokenizer.encode(text, add_special_tokens=special)) for text in texts]


def _prompts_ids(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """`prompt_ids` of each."""
    start, end = tokenizer.bos_token, tokenizer.eos_token_id
    begun = [not (isinstance(text, Rendered) or (start and text.startswith(start))) for text in prompts]
    of_kind = {}
    for special in (True, False):
        texts = [text for text, own in zip(prompts, begun, strict=True) if own is special]
        of_kind[special] = iter(_ids(texts, tokenizer, special=special))
    found = [next(of_kind[special]) for special in begun]
    for text, ids in zip(prompts, found, strict=True):
        if end is None or isinstance(text, Rendered) or text.endswith(tokenizer.eos_token):
            continue
        while len(ids) > 1 and ids[-1] == end:
            ids.pop()
    return found


def _with_places(texts: list[str], tokenizer: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, where each token stands in the text as (begin, end) in characters) of each text."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if texts and getattr(inner, "is_fast", False):
        found = inner(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))
    several = []
    for text in texts:
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        ends = [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
        several.append((ids, list(zip([0, *ends[:-1]], ends, strict=True))))
    return several


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer writes before a text by itself, up to its start token."""
    ids, start = list(tokenizer.encode("", add_special_tokens=True)), tokenizer.bos_token_id
    return ids[: ids.index(start) + 1] if start in ids else []
