"""A conversation as it is trained on: the text that the chat template writes, and which parts are learned.

An answer is learned from where the generation prompt ends to the token that closes the turn, both found by
letting the template render the messages up to that answer. So the model learns to write, after exactly the
text it will be asked with, exactly what the template would have written. What stands behind the closing token
(a line end, what Phi-3 writes once at the very end) is not part of an answer.

Some templates write an earlier answer differently than the last: Qwen3 drops its thinking, gpt-oss ends it
with another token. Such an answer is trained in a row of its own, which ends with it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mlx_adapters.data.reasoning import PROBE, common, opens_thinking, reasoning_of
from mlx_adapters.data.tool_calls import with_arguments
from mlx_adapters.errors import DataError
from mlx_adapters.models.chat_template import assistant_marks, chat_prompt
from mlx_adapters.models.stop_tokens import turn_end

__all__ = ["Conversation", "closing_token", "conversations"]

Messages = Sequence[Mapping[str, Any]]
_BY_ANSWER = "the chat template writes the messages before an answer by what the answer is"
_SHORT = 100  # characters that a template may write between a question and an answer


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
    again: bool  # the generation prompt has text that the template leaves out of a conversation
    ended: bool = False  # its content ends the turn: gpt-oss closes a tool call with a token of its own
    shift: int = 0  # how much farther it begins than in what the template writes

    @property
    def end(self) -> int:
        return self.content_end + len(self.closing)

    @property
    def closed(self) -> bool:
        return bool(self.closing) or self.ended

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
    messages = with_arguments(messages, tokenizer, kwargs)
    answers = [_answer(messages, index, tokenizer, kwargs, closing) for index in learned]
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
        marks = _marks(messages[: learned[place] + 1], tokenizer, kwargs, one.begin - one.shift, one.shift)
        own = tuple(spans.values()) if last else ((one.begin, one.end),)
        parts = tuple(part for span in own for part in _marked(span, marks, one.done, one.closing or closing))
        empty = any(answers[each].empty for each in spans) if last else one.empty
        rows.append(Conversation(one.done, parts, one.closed, empty))
    if not any(row.learned for row in rows):
        raise DataError("the chat template's {% generation %} marks no part of the answers: none is learned")
    return rows


def _marks(
    messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any], begin: int, shift: int
) -> list[tuple[int, int]] | None:
    """What the template marks by `{% generation %}`, `shift` characters farther from `begin` on; None without
    such marks."""
    marks = assistant_marks(messages, tokenizer, kwargs)
    if marks is None:
        return None
    return [(first + shift * (first >= begin), last + shift * (last > begin)) for first, last in marks]


def _marked(
    span: tuple[int, int], marks: list[tuple[int, int]] | None, text: str, closing: str
) -> Iterator[tuple[int, int]]:
    """The parts of an answer that are learned: all of it or, of a template with marks, what they mark, with
    the token that closes the turn behind them."""
    if marks is None:
        yield span
        return
    for begin, end in marks:
        if closing and text.startswith(closing, end):
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


def _answer(
    messages: Messages, index: int, tokenizer: Any, kwargs: Mapping[str, Any], closing: str
) -> _Answer:
    """Where message `index` begins and ends in what the template writes up to it."""
    context = messages[:index]
    done = str(chat_prompt(messages[: index + 1], tokenizer, kwargs, answer=False))
    asked = str(chat_prompt(context, tokenizer, kwargs))
    probe = str(
        chat_prompt([*context, {"role": "assistant", "content": PROBE}], tokenizer, kwargs, answer=False)
    )
    begin, shift, again = common(asked, probe), 0, False
    if begin < len(asked):
        bare = common(str(chat_prompt(context, tokenizer, kwargs, answer=False)), asked)
        # what opens reasoning is left out, or closed, where the template writes an answer without any
        if not (opens_thinking(asked[bare:]) and begin > bare):
            own = begin if begin >= bare else _behind(asked, probe)
            if not done.startswith(probe[:own]):
                raise DataError(_BY_ANSWER)
            done, probe = (asked + text[own:] for text in (done, probe))  # as the model will be asked
            begin, shift, again = len(asked), len(asked) - own, True
    elif not done.startswith(asked):  # it asks for an answer without reasoning, and this one has some
        bare = common(str(chat_prompt(context, tokenizer, kwargs, answer=False)), asked)
        begin = max(bare, common(asked, done))
    if not done.startswith(asked[:begin]):
        raise DataError(_BY_ANSWER)
    if (thought := reasoning_of(messages[index])) not in done:
        raise DataError(
            f"the chat template does not write the reasoning of an answer ({thought[:20]!r}), which would "
            "not be learned: leave it out of the rows, or give a --template that writes it"
        )
    tail = probe.rpartition(PROBE)[2]
    content_end = (
        len(done) - len(tail) if tail and done.endswith(tail) else _content_end(done, begin, closing)
    )
    if calls := messages[index].get("tool_calls"):
        _must_write(calls, done[begin:])
    if closing and done.startswith(closing, content_end):
        return _Answer(done, begin, content_end, closing, again, shift=shift)
    if calls:
        call = _Answer(done.rstrip(), begin, len(done.rstrip()), "", again, shift=shift)
        return _ended_call(call, messages[: index + 2], tokenizer, kwargs)
    return _Answer(done, begin, content_end, "", again, shift=shift)


def _must_write(calls: Any, text: str) -> None:
    """DataError where the text of an answer is without its tool calls: many templates leave them out."""
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"the chat template does not write tool calls ({name}), so the answer would be without: take "
                "another template, or leave such rows out"
            )


def _ended_call(call: _Answer, messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any]) -> _Answer:
    """A tool call that is not closed as other answers are: by a token of its own (gpt-oss), by the one that
    opens the tool's answer, the last of `messages` (GLM), or by none."""
    special = tuple(str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
    if call.done.endswith(special) or call.again:
        return replace(call, ended=True)
    answered = (
        messages if messages[-1].get("role") == "tool" else [*messages, {"role": "tool", "content": ""}]
    )
    try:
        longer = str(chat_prompt(answered, tokenizer, kwargs, answer=False))
    except DataError:  # a template that has no such role
        longer = ""
    follows = longer[len(call.done) :] if longer.startswith(call.done) else ""
    if found := max((token for token in special if follows.startswith(token)), key=len, default=""):
        return replace(call, done=call.done + found, closing=found)
    return replace(call, ended=True)


def _behind(asked: str, probe: str) -> int:
    """Where in `probe` begins what stands behind `asked`, though the messages before are written otherwise
    (Mistral-Nemo has the system message in the last question, and not at all where an answer follows): behind
    the longest end of `asked` that is there."""
    back, head = asked[::-1], probe[: probe.rfind(PROBE)]
    ends = range(max(0, len(head) - _SHORT), len(head) + 1)
    return max(ends, key=lambda end: (common(back, head[:end][::-1]), end))


def _content_end(done: str, begin: int, closing: str) -> int:
    """Where an answer's content ends whose tail is not that of other answers."""
    found = done.rfind(closing, begin) if closing else -1
    return found if found >= 0 else len(done.rstrip()) if done[begin:].strip() else len(done)


def _found_in(whole: str, answer: _Answer, closing: str) -> tuple[int, int] | None:
    """(begin, end) of an earlier answer in the whole conversation; None where it is another there, or nothing
    there would teach it to end."""
    if answer.again or not whole.startswith(answer.done[: answer.content_end]):
        return None
    if answer.ended:
        return answer.begin, answer.content_end
    closing = answer.closing or closing
    if closing and whole.startswith(closing, answer.content_end):
        return answer.begin, answer.content_end + len(closing)
    return None
