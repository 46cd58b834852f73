"""The one loop from items to records: ask the model, read its answer, judge it.

An item keeps its index in the test set from here to its record, through decoding and across processes.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_adapters.data.overlap import item_hash, relation, row_text
from mlx_adapters.data.reasoning import before_answer
from mlx_adapters.data.templates import Asked, prompt_for, question_of
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.evaluate.answers import EXTRACTIONS, RULES, Extraction, correct, extract
from mlx_adapters.evaluate.choices import Choices, as_label, parse
from mlx_adapters.evaluate.score import Record
from mlx_adapters.evaluate.tasks import Item, Task
from mlx_adapters.generate.decode import GREEDY, Decoding, generate_texts
from mlx_adapters.generate.likelihood import choice_ids, loglikelihoods, pick
from mlx_adapters.models.own_template import OWN, ChatTemplate

__all__ = ["Asking", "answer"]

Items = Mapping[int, Item]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How items are asked and answers are read.

    Attributes:
        template: the prompt template.
        decoding: how answers are decoded; None scores the choices by their likelihood instead.
        choices: what is scored then. `label`: the usual prompt, and what the paper trains, "the correct
            answer is answer1" or "The answer is (A)."; `text`: lm-evaluation-harness' cloze, the text of each
            choice after "Question: ...\\nAnswer:", whatever the template.
        reading: which reading of an answer counts.
        batch_size: rows that are computed together, by default as many as memory allows.
        max_tokens: the longest answer; None: each set's own.
        seen: what the adapter remembers of its training rows (`seen_hashes`); items among them are marked.
        chat: how the template `chat` writes, where it is not as the tokenizer alone would.
    """

    template: str
    decoding: Decoding | None = GREEDY
    choices: str = "label"
    reading: Extraction = "strict"
    batch_size: int | None = None
    max_tokens: int | None = None
    seen: frozenset[str] = frozenset()
    chat: ChatTemplate = OWN

    @property
    def settings(self) -> dict[str, Any]:
        """What a report keeps of the decoding."""
        own = asdict(self.decoding) if self.decoding else {"scored": self.choices}
        written = {"chat_template_kwargs": self.chat.kwargs, "chat_template": self.chat.digest}
        return own | {"max_tokens": self.max_tokens} | {k: v for k, v in written.items() if v}

    @property
    def rules(self) -> str | None:
        """How a report names the reading; None for likelihoods, which are not read."""
        return RULES[self.reading] if self.decoding else None


def answer(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    task: Task,
    items: Sequence[Item],
    asking: Asking,
    *,
    done: frozenset[int] = frozenset(),
) -> Generator[Record]:
    """Yield a record for each item as its answer is done, not in the items' order; those whose index is in
    `done` are left out."""
    left = {i: item for i, item in enumerate(_labelled(items, task)) if i not in done}
    tokenizer = Asked(asking.template, asking.chat).on(tokenizer)
    if asking.decoding is None:
        yield from _likeliest(model, tokenizer, task, left, asking)
        return
    prompts = {i: _prompt(item, asking.template, tokenizer) for i, item in left.items()}
    answers = generate_texts(
        model,
        tokenizer,
        {i: prompt_ids(prompt, tokenizer) for i, prompt in prompts.items()},
        max_tokens=task.max_tokens if asking.max_tokens is None else asking.max_tokens,
        batch_size=asking.batch_size,
        decoding=asking.decoding,
    )
    for i, response in answers:
        read = {
            how: extract(response, task.kind, how=how, question=left[i].instruction) for how in EXTRACTIONS
        }
        right = {how: correct(task.kind, read[how], left[i].label) for how in EXTRACTIONS}
        yield replace(
            _unanswered(task, i, left[i], prompts[i], asking.seen),
            response=response,
            extracted=read[asking.reading],
            correct=right[asking.reading],
            strict_extracted=read["strict"],
            strict_correct=right["strict"],
            paper_extracted=read["paper"],
            paper_correct=right["paper"],
        )


def _likeliest(
    model: nn.Module, tokenizer: TokenizerWrapper, task: Task, items: Items, asking: Asking
) -> Iterator[Record]:
    """A record of each item whose answer is the likeliest choice."""
    choices = {i: _choices(task, item, i) for i, item in items.items()}
    cloze = asking.choices == "text"
    if cloze:
        prompts = {i: f"Question: {one.question}\nAnswer:" for i, one in choices.items()}
        encoded = {i: _cloze(prompts[i], one, tokenizer) for i, one in choices.items()}
    else:
        prompts = {i: _prompt(item, asking.template, tokenizer, closed=True) for i, item in items.items()}
        says = "The answer is ({})." if task.kind == "letter" else "the correct answer is {}"
        encoded = {
            i: (
                prompt_ids(prompts[i], tokenizer),
                [tokenizer.encode(says.format(label), add_special_tokens=False) for label in one.texts],
            )
            for i, one in choices.items()
        }
    for i, scores in loglikelihoods(model, encoded, batch_size=asking.batch_size):
        labels = list(choices[i].texts)
        lengths = [max(len(text), 1) for text in (choices[i].texts.values() if cloze else labels)]
        likeliest, norm = (labels[place] for place in pick(scores, lengths))
        yield replace(
            _unanswered(task, i, items[i], prompts[i], asking.seen),
            extracted=likeliest,
            correct=likeliest == items[i].label,
            norm_extracted=norm,
            norm_correct=norm == items[i].label,
            loglikelihoods=dict(zip(labels, scores)),
        )


def _cloze(prompt: str, choices: Choices, tokenizer: TokenizerWrapper) -> tuple[list[int], list[list[int]]]:
    pairs = [choice_ids(prompt, f" {text}", tokenizer) for text in choices.texts.values()]
    return pairs[0][0], [ids for _, ids in pairs]


def _labelled(items: Sequence[Item], task: Task) -> list[Item]:
    """The items with labels as readings are: those of a file are already, those made by hand may not be."""
    found = []
    for index, item in enumerate(items):
        label = as_label(item.label, task.kind)
        if label is None:
            raise DataError(f"{task.name}: item {index}: {item.label!r} is no answer of the kind {task.kind}")
        found.append(replace(item, label=label))
    return found


def _prompt(item: Item, template: str, tokenizer: TokenizerWrapper, *, closed: bool = False) -> str:
    """The text of a question; `closed`: up to where an answer stands, with no reasoning left open."""
    if closed and template == "chat":
        return before_answer(question_of(item.instruction, item.input), tokenizer)
    return prompt_for(item.instruction, item.input, template=template, tokenizer=tokenizer, phase="eval")


def _choices(task: Task, item: Item, index: int) -> Choices:
    choices = parse(item.instruction, task.kind)
    if choices is None:
        if task.kind == "number":
            raise ConfigError(f"{task.name}: its answers are numbers, so there are no choices to score")
        raise DataError(
            f"{task.name}: item {index}: its instruction lists no choices of the kind {task.kind}"
        )
    return choices


def _unanswered(task: Task, index: int, item: Item, prompt: str, seen: frozenset[str]) -> Record:
    """The item's record before it is answered."""
    text = row_text({"instruction": item.instruction, "input": item.input}, "instruction")
    known = relation(seen, text)
    return Record(
        task=task.name,
        index=index,
        item=item_hash(text),
        prompt=prompt,
        response="",
        extracted=None,
        label=item.label,
        correct=False,
        seen=known == "seen",
        near=known == "near",
    )
