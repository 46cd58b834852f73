"""What becomes of rows that are longer than the max length."""

from typing import Any

import pytest

from mlx_adapters.data.long_rows import LONG_ROWS, Fitted, fitted, left_out, shortened
from mlx_adapters.data.tokens import Encoded, Example
from mlx_adapters.errors import ConfigError, DataError

START, SPECIAL = 1, {1, 2}


class Tokenizer:
    all_special_ids = (1, 2)


def labels(example: Example) -> list[int]:
    """The tokens with a label, in order."""
    gaps = {index for begin, end in example.unlabelled for index in range(begin, end)}
    return [id for index, id in enumerate(example.ids) if index >= example.loss_start and index not in gaps]


def fit(examples: list[Example], length: int, rule: str, form: str = "text") -> Fitted:
    whole = Encoded(examples, longest=max(len(example.ids) for example in examples))
    return fitted(whole, length, rule, form=form, origin="here", tokenizer=Tokenizer())


def text(count: int, *, start: bool = True) -> Example:
    """Tokens that are all different, so that each can be followed."""
    return Example([*([START] if start else []), *range(100, 100 + count)], 1)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("length", [16, 17, 32, 40])
@pytest.mark.parametrize("count", [15, 16, 31, 32, 33, 100, 257])
def test_chunks_learn_every_token_once_with_what_stands_before_it(
    count: int, length: int, start: bool
) -> None:
    whole = text(count, start=start)
    done = fit([whole], length, "split")
    assert all(len(part.ids) <= length for part in done.examples)
    assert [id for part in done.examples for id in labels(part)] == labels(whole)
    assert all((part.ids[0] == START) == start for part in done.examples)
    for part in done.examples[1:]:
        context = part.ids[int(start) : part.loss_start]
        assert len(context) == length // 8, "an eighth is repeated"
        assert part.ids[int(start) :] == list(range(context[0], part.ids[-1] + 1)), "and nothing lies between"
    assert (done.truncated, done.chunks) == ((1, len(done.examples)) if len(whole.ids) > length else (0, 0))


def test_the_prompt_loses_its_beginning_and_the_answer_nothing() -> None:
    answer = [7, 8, 9, 2]
    row = Example([START, *range(100, 120), *answer], 21)
    (short,) = fit([row], 10, "left", "instruction").examples
    assert short == Example([START, *range(115, 120), *answer], 6)
    assert left_out(row, 10, "left", SPECIAL) == [(1, 16)]
    (cut,) = fit([Example(row.ids, 2)], 10, "cut", "instruction").examples
    assert cut.ids == row.ids[:10]
    # an answer that is longer by itself: one token stays in front of it, and its end is cut
    (rest,) = shortened(Example([100, 101, *range(200, 240)], 2), 8, "left")
    assert rest == Example([100, *range(200, 207)], 1)
    assert left_out(Example([100, 101, *range(200, 240)], 2), 8, "left") == [(1, 2), (9, 42)]


def test_a_chat_keeps_its_answers_where_its_first_prompt_is_long() -> None:
    chat = Example([START, *range(100, 130), 7, 8, 50, 51, 9, 2], 31, ((33, 35),))
    (short,) = shortened(chat, 12, "left", SPECIAL)
    assert labels(short) == labels(chat) == [7, 8, 9, 2]
    assert short.ids[-6:] == chat.ids[-6:]
    assert short.unlabelled == ((8, 10),)


def test_long_rows_are_counted_and_said_in_one_line() -> None:
    rows = [text(3), text(40), Example([START, *range(100, 140), 7, 2], 41)]
    said = {
        "cut": ("2 cut at 20 tokens", 2, 1),
        "left": ("2 shortened to 20 tokens at the prompt's beginning", 3, 0),
        "split": ("2 split into 5 chunks of at most 20 tokens", 6, 0),
        "drop": ("2 left out: longer than 20 tokens", 1, 0),
    }
    assert said.keys() == {*LONG_ROWS}
    for rule, (words, count, dropped) in said.items():
        done = fit(rows, 20, rule)
        assert (f"{done.truncated} {done.in_words}", len(done.examples)) == (words, count), rule
        assert done.dropped == dropped, rule
        assert fit(rows, 64, rule).in_words == ""
        assert fit(rows, 64, rule).examples is not None


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ConfigError, match="here: rows of the form instruction are not split"):
        fit([text(40)], 20, "split", "instruction")
    with pytest.raises(ConfigError, match="at least 16"):
        fit([text(40)], 15, "split")
    with pytest.raises(DataError, match=r"within 8 tokens\. Raise --max-length"):
        fit([text(40)], 8, "drop")
    with pytest.raises(DataError, match=r"within 8 tokens\. Raise --max-length"):
        fit([Example(text(40).ids, 20)], 8, "cut")


@pytest.mark.parametrize("rule", ["cut", "left", "drop"])
def test_weighted_rows_stay_with_their_source(rule: str) -> None:
    import numpy as np

    from mlx_adapters.data.mixture import Weighted

    rows = [text(40), text(3), Example([START, *range(100, 140), 7, 2], 41), text(4)]
    whole = Encoded(Weighted(rows, np.array([0, 0, 1, 1]), [3, 1]), longest=43)
    done: Any = fitted(whole, 20, rule, form="completion", origin="here", tokenizer=Tokenizer())
    plain = fit(rows, 20, rule, "completion")
    assert list(done.examples) == plain.examples
    assert done.examples.lengths.tolist() == [len(example.ids) for example in plain.examples]
    sizes = {"cut": "2+1", "left": "2+2", "drop": "1+1"}[rule]
    assert done.examples.described == f"3:1 of {sizes} rows"
