"""A conversation as it is trained on: the text that the chat template writes, and which parts are learned.

An answer is learned from where the generation prompt ends to the token that closes the turn, both found by
letting the template render the messages up to that answer. So the model learns to write, after exactly the
text it will be asked with, exactly what the template would have written. What stands behind the closing token
(a line end, what Phi-3 writes once at the very end) is not part of an answer.

Some templates write an earlier answer differently than the last: Qwen3 drops its thinking, gpt-oss ends it
with another token. Such an answer is trained in a row of its own, which ends with it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import Rendered, assistant_marks, chat_prompt
from mlx_adapters.models.stop_tokens import turn_end

__all__ = ["Conversation", "closing_token", "conversations", "before_answer", "has_reasoning", "left_open"]

Messages = Sequence[Mapping[str, Any]]
_REASONING = ("reasoning_content", "reasoning", "thinking")  # one of them, as transformers has it
_PROBE = "zqxj"  # an answer that occurs in no template


@dataclass(frozen=True)
class Conversation:
    """One training text of a chat: `learned` are its answers as (begin, end) in characters. It is `closed`
    where the last answer ends with the token that the template closes a turn with, and `empty` where an
    answer has no text."""

    text: str
    learned: tuple[tuple[int, int], ...]
    closed: bool
    empty: bool


@dataclass(frozen=True)
class _Answer:
    """An answer in the text `done` that ends with it: from `begin` to `content_end`, closed by `closing`."""

    done: str
    begin: int
    content_end: int
    closing: str
    more: int  # characters of the generation prompt that the template leaves out of a conversation

    @property
    def end(self) -> int:
        return self.content_end + len(self.closing)

    @property
    def empty(self) -> bool:
        return not self.done[self.begin : self.content_end].strip()


def conversations(
    messages: Messages,
    tokenizer: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    only: Collection[int] | None = None,
) -> list[Conversation]:
    """The training texts of one conversation: one, and one more for each answer that would be rewritten.

    Args:
        messages: objects with `role` and `content`; answers with `weight` 0 or `train` false are not learned.
        tokenizer: it brings the chat template.
        kwargs: the template's own variables.
        only: indices of the messages that may be learned; by default all answers.

    Raises:
        DataError: no answer is to be learned, or the template refuses the messages.
    """
    learned = [
        index
        for index, message in enumerate(messages)
        if index and _is_learned(message) and (only is None or index in only)
    ]
    if not learned:
        raise DataError(
            "no message is an answer to learn: the role must be 'assistant', after at least one other message"
        )
    kwargs, (_, closing) = dict(kwargs or {}), closing_token(tokenizer, tokenizer.chat_template)
    answers = [_answer(messages[: index + 1], tokenizer, kwargs, closing) for index in learned]
    whole = answers[-1].done
    spans: dict[int, tuple[int, int]] = {}  # of the answers that stand in the whole conversation as learned
    for place, answer in enumerate(answers[:-1]):
        if span := _found_in(whole, answer, closing):
            spans[place] = span
    spans[len(answers) - 1] = answers[-1].begin, answers[-1].end
    rows = []
    for place, one in enumerate(answers):
        last = place == len(answers) - 1
        if not last and place in spans:
            continue
        marks = _marks(messages[: learned[place] + 1], tokenizer, kwargs, one)
        own = tuple(spans.values()) if last else ((one.begin, one.end),)
        parts = tuple(part for span in own for part in _marked(span, marks, one, closing))
        empty = any(answers[each].empty for each in spans) if last else one.empty
        rows.append(Conversation(one.done, parts, bool(one.closing), empty))
    if not any(row.learned for row in rows):
        raise DataError("the chat template's {% generation %} marks no part of the answers: none is learned")
    return rows


def _marks(
    messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any], answer: _Answer
) -> list[tuple[int, int]] | None:
    """What the template marks by `{% generation %}` in the text of an answer; None without such marks."""
    before = answer.begin - answer.more
    marks = assistant_marks(messages, tokenizer, kwargs, answer.done[:before] + answer.done[answer.begin :])
    if marks is None:
        return None
    more = answer.more  # they stand behind what was put before the answer
    return [(begin + more * (begin >= before), end + more * (end > before)) for begin, end in marks]


def _marked(
    span: tuple[int, int], marks: list[tuple[int, int]] | None, answer: _Answer, closing: str
) -> Iterator[tuple[int, int]]:
    """The parts of an answer that are learned: all of it or, of a template with marks, what they mark, with
    the token that closes the turn behind them."""
    if marks is None:
        yield span
        return
    for begin, end in marks:
        if closing and answer.done.startswith(closing, end):
            end += len(closing)
        begin, end = max(begin, span[0]), min(end, span[1])
        if begin < end:
            yield begin, end


def _is_learned(message: Mapping[str, Any]) -> bool:
    return (
        message.get("role") == "assistant"
        and message.get("weight", 1) != 0
        and message.get("train") is not False
    )


@lru_cache(maxsize=4)
def closing_token(tokenizer: Any, template: str | None) -> tuple[int | None, str]:
    """The token that closes an answer in the chat `template` of `tokenizer`, and its text; None and "" where
    the template writes none. It is found once, by rendering the template."""
    end = turn_end(tokenizer)
    return end, "" if end is None else str(tokenizer.added_tokens_decoder[end].content)


def left_open(tokenizer: Any) -> str:
    """What the generation prompt opens at its end, a `<think>`, although the template writes answers without
    reasoning without it: they are not trained behind it. Empty where it opens nothing of the kind."""
    try:
        opened, begin, asked, _ = _opening([{"role": "user", "content": "a"}], tokenizer)
    except DataError:  # a template that does not write such a question
        return ""
    return asked[begin:] if opened else ""


def before_answer(messages: Messages, tokenizer: Any) -> Rendered:
    """The prompt behind which an answer stands at once: what the template asks with or, where that leaves
    reasoning open, what it writes before an answer that has none."""
    opened, _, asked, probe = _opening(messages, tokenizer)
    return Rendered(probe.partition(_PROBE)[0] if opened and _PROBE in probe else asked)


def _opening(messages: Messages, tokenizer: Any) -> tuple[bool, int, str, str]:
    """(whether the generation prompt leaves reasoning open, how much of it the template writes before an
    answer without any, the prompt, the conversation with such an answer)."""
    asked = str(chat_prompt(messages, tokenizer))
    answered = [*messages, {"role": "assistant", "content": _PROBE}]
    probe = str(chat_prompt(answered, tokenizer, answer=False))
    begin = _common(asked, probe)
    bare = _common(str(chat_prompt(messages, tokenizer, answer=False)), asked)
    return _opens_thinking(asked[bare:]) and begin > bare, begin, asked, probe


def _answer(messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any], closing: str) -> _Answer:
    """Where the last of `messages` begins and ends in what the template writes for them."""
    context = messages[:-1]
    done = str(chat_prompt(messages, tokenizer, kwargs, answer=False))
    asked = str(chat_prompt(context, tokenizer, kwargs))
    probe = str(
        chat_prompt([*context, {"role": "assistant", "content": _PROBE}], tokenizer, kwargs, answer=False)
    )
    begin, more = _common(asked, probe), ""
    if begin < len(asked):
        bare = _common(str(chat_prompt(context, tokenizer, kwargs, answer=False)), asked)
        # what opens reasoning is left out, or closed, where the template writes an answer without any
        if not (_opens_thinking(asked[bare:]) and begin > bare):
            more = asked[begin:]  # not in a conversation, but the model will be asked with it
            done, probe = (asked + text[begin:] for text in (done, probe))
            begin += len(more)
    thought = _reasoning(messages[-1])
    if not done.startswith(probe[:begin]):
        if thought:
            raise DataError(
                "an answer has reasoning, but the generation prompt closes it at once: give "
                """--chat-template-kwargs '{"enable_thinking": true}', or leave the reasoning out"""
            )
        raise DataError("the chat template writes the messages before an answer by what the answer is")
    if thought not in done:
        raise DataError(
            "the chat template does not write the reasoning of an answer, which would not be learned: leave "
            "it "
            "out of the rows, or give a --template that writes it"
        )
    tail = probe.rpartition(_PROBE)[2]
    content_end = (
        len(done) - len(tail) if tail and done.endswith(tail) else _content_end(done, begin, closing)
    )
    closes = closing if closing and done.startswith(closing, content_end) else ""
    return _Answer(done, begin, content_end, closes, len(more))


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _opens_thinking(text: str) -> bool:
    """Whether a generation prompt ends in reasoning that it leaves open."""
    opened = text.rpartition("think")[0]
    return bool(opened) and not opened.endswith("/")


def has_reasoning(message: Any) -> bool:
    """Whether a message of a row comes with reasoning."""
    return isinstance(message, Mapping) and bool(_reasoning(message))


def _reasoning(message: Mapping[str, Any]) -> str:
    """The reasoning of an answer, in a field of its own or in its content; empty without any."""
    fields = [message.get(name) for name in _REASONING]
    inside, end, _ = str(message.get("content") or "").partition("</think>")
    found = [each for each in fields if isinstance(each, str)] + [
        inside.rpartition("<think>")[2] if end else ""
    ]
    return next((text.strip() for text in found if text.strip()), "")


def _content_end(done: str, begin: int, closing: str) -> int:
    """Where an answer's content ends whose tail is not that of other answers."""
    found = done.rfind(closing, begin) if closing else -1
    return found if found >= 0 else len(done.rstrip()) if done[begin:].strip() else len(done)


def _found_in(whole: str, answer: _Answer, closing: str) -> tuple[int, int] | None:
    """(begin, end) of an earlier answer in the whole conversation; None where it is another there, or nothing
    there would teach it to end."""
    if answer.more or not closing or not whole.startswith(answer.done[: answer.content_end]):
        return None
    if whole.startswith(closing, answer.content_end):
        return answer.begin, answer.content_end + len(closing)
    return None
