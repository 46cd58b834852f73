"""Comparing two evaluations: the exact paired test, and only on the same items."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from command_line import cli

from mlx_adapters.errors import DataError
from mlx_adapters.evaluate.compare import compare, differ, mcnemar, words
from mlx_adapters.evaluate.records import read_report
from mlx_adapters.evaluate.score import Record


def records(verdicts: str, task: str = "SVAMP") -> list[Record]:
    """One record for each letter: r is right, w is wrong."""
    return [
        Record(task, index, f"{index:016x}", "?", "7", "7", "7", verdict == "r")
        for index, verdict in enumerate(verdicts)
    ]


def report(file: Path, rows: list[Record]) -> Path:
    file.write_text(json.dumps({"model": "m", "records": [asdict(row) for row in rows]}))
    return file


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 6, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (5, 5, 1.0),
        (10, 3, 2 * (1 + 13 + 78 + 286) / 2**13),
    ],
)
def test_p_is_that_of_the_binomial_distribution(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-9)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_p_is_exact_for_many_items() -> None:
    exact = 2 * sum(math.comb(3000, i) for i in range(1401)) / 2**3000
    assert mcnemar(1600, 1400) == pytest.approx(exact, rel=1e-8)
    assert 0 < mcnemar(10000, 8000) < 1e-40


def test_only_the_items_that_differ_count() -> None:
    (found,) = compare(records("rrrrwwwwrr"), records("rrwwrwwwww"))
    assert (found.a_correct, found.b_correct, found.only_a, found.only_b) == (6, 3, 4, 1)
    assert found.difference == pytest.approx(0.3)
    assert found.p == pytest.approx(2 * (1 + 5) / 32)
    # Bonett and Price by hand: (5 - 2) / 12 +- 1.96 sqrt((7/12 - (3/12)^2) / 12)
    half = 1.959964 * math.sqrt((7 / 12 - 1 / 16) / 12)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_the_verdict_is_said_in_words() -> None:
    a, b = records("r" * 60 + "w" * 40), records("r" * 40 + "w" * 60)
    (found,) = compare(a, b)
    said = words(found, "lora", "base")
    assert "lora 60.0%, base 40.0% on the same 100 items" in said
    assert "They differ on 20: lora alone is right on 20, base alone on 0" in said
    assert said.endswith("p = 1.9e-06: lora is better.") or said.endswith("p = 2e-06: lora is better.")
    assert words(replace(found, only_a=0, only_b=20), "lora", "base").endswith("base is better.")
    (same,) = compare(a, a)
    assert "no difference at all" in words(same, "lora", "base")
    (close,) = compare(records("rrrrw"), records("rwwrr"))
    assert words(close, "lora", "base").endswith("no evidence that one is better.")


def test_several_tests_share_the_five_percent() -> None:
    (found,) = compare(records("r" * 7 + "w" * 3), records("w" * 10))  # p = 2/128
    assert words(found, "a", "b").endswith("a is better.")
    assert words(found, "a", "b", tests=8).endswith("no evidence that one is better.")


def test_tasks_are_compared_each_and_together() -> None:
    a = records("rrrw") + records("rr", "gsm8k")
    b = records("rwww") + records("rw", "gsm8k")
    found = compare(a, b)
    assert [(one.task, one.total, one.only_a) for one in found] == [
        ("SVAMP", 4, 2),
        ("gsm8k", 2, 1),
        ("all", 6, 3),
    ]


def marked(verdicts: str, relation: str, task: str = "SVAMP") -> list[Record]:
    """As `records`; `relation` has s for an item seen in training, n for a near one."""
    return [
        replace(record, seen=mark == "s", near=mark == "n")
        for record, mark in zip(records(verdicts, task), relation, strict=True)
    ]


def test_the_unseen_share_has_its_own_test_and_interval() -> None:
    """What one adapter has memorised is not what it is better at."""
    a = marked("rrrrrrrrrrrr" + "rrww", "s" * 10 + "nn" + "----")
    b = marked("wwwwwwwwwwww" + "wrrr", "-" * 16)
    whole, unseen = compare(a, b)
    assert (whole.part, whole.total, whole.seen, whole.only_a, whole.only_b) == ("all", 16, 12, 13, 2)
    assert (unseen.part, unseen.total, unseen.seen, unseen.only_a, unseen.only_b) == ("unseen", 4, 0, 1, 2)
    (alone,) = compare(a[12:], b[12:])
    assert asdict(unseen) == asdict(alone) | {"part": "unseen"}
    assert words(whole, "a", "b").endswith("a is better.")
    assert words(unseen, "a", "b").startswith(
        "SVAMP, unseen in training: a 50.0%, b 75.0% on the same 4 items."
    )
    assert words(unseen, "a", "b").endswith("no evidence that one is better.")
    both = compare(a + marked("rw", "s-", "gsm8k"), b + marked("rr", "--", "gsm8k"))
    assert [(one.task, one.part, one.total) for one in both] == [
        *(("SVAMP", "all", 16), ("SVAMP", "unseen", 4)),
        *(("gsm8k", "all", 2), ("gsm8k", "unseen", 1)),
        *(("all", "all", 18), ("all", "unseen", 5)),
    ]


def test_a_set_without_an_unseen_item_says_so() -> None:
    (found,) = compare(marked("rrw", "ssn"), marked("rww", "---"))
    assert found.seen == found.total
    assert "Every one was seen in training" in words(found, "a", "b")
    (new,) = compare(records("rrw"), records("rww"))
    assert "seen in training" not in words(new, "a", "b")


ASKED = {
    "model": "qwen",
    "adapter": "a",
    "adapter_sha256": "1",
    "template": "alpaca",
    "decoding": "greedy",
    "settings": {"kind": "greedy", "beams": 4, "max_tokens": None},
    "reading": "strict 3",
}
LIKELIHOOD = {"decoding": "likelihood", "settings": {"scored": "label", "max_tokens": None}, "reading": None}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"adapter": "b", "adapter_sha256": "2", "limit": 5}, []),
        ({"model": "phi"}, ["model"]),
        ({"template": "chat"}, ["template"]),
        ({"decoding": "beam", "settings": {"kind": "beam", "beams": 2, "max_tokens": 8}},
         ["decoding", "beams", "max_tokens"]),
        (LIKELIHOOD, ["decoding", "reading"]),
        ({"reading": "paper"}, ["reading"]),
        ({"reading": None}, ["reading"]),
    ],
)  # fmt: skip
def test_reports_that_were_asked_or_read_otherwise_are_told(
    tmp_path: Path, changes: dict[str, object], names: list[str]
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    rows = [asdict(row) for row in records("rrww")]
    a.write_text(json.dumps(ASKED | {"records": rows}))
    b.write_text(json.dumps(ASKED | changes | {"records": rows}))
    said = cli("compare", a, b).stdout
    assert said.startswith("The reports differ in ") == bool(names)
    for name in names:
        assert f"{name} (" in said
    (found,) = json.loads(cli("compare", a, b, "--json").stdout)
    assert list(found["differ"]) == names


def test_what_is_scored_by_likelihood_is_told() -> None:
    by_text = LIKELIHOOD | {"settings": {"scored": "text", "max_tokens": None}}
    assert differ(ASKED | LIKELIHOOD, ASKED | by_text) == {"scored": ("label", "text")}


Change = Callable[[list[Record]], list[Record]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "4 items, the other 3; 1 in one only .*item 3"),
        (lambda rows: [replace(rows[0], item="f" * 16), *rows[1:]], "item 0 is another question"),
        (lambda rows: [replace(rows[0], label="8"), *rows[1:]], "item 0 is another question"),
        (lambda rows: [replace(row, task="gsm8k") for row in rows], "different tasks: SVAMP; gsm8k"),
        (lambda rows: [*rows, rows[2]], "second report has item 2 of SVAMP twice"),
    ],
)
def test_other_items_are_refused(change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(records("rrww"), change(records("rrww")))


def test_the_command_reads_two_reports(tmp_path: Path) -> None:
    a = report(tmp_path / "a.json", records("r" * 30 + "w" * 10))
    b = report(tmp_path / "b.json", records("r" * 10 + "w" * 30))
    assert "a is better." in cli("compare", a, b).stdout
    (found,) = json.loads(cli("compare", a, b, "--json").stdout)
    assert (found["only_a"], found["only_b"], found["total"]) == (20, 0, 40)
    short = report(tmp_path / "c.json", records("r" * 10))
    assert "Only answers to the same items can be compared" in cli("compare", a, short, code=2).output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "holds no records"),
        ('{"records": [{"task": "SVAMP"}]}', "record 0: is not a record"),
        (
            '{"records": [{"task": "a", "index": 0, "item": "", "correct": true, "label": "1"}]}',
            "not a record",
        ),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_report(file)
    with pytest.raises(DataError, match="no such file"):
        read_report(tmp_path / "none.json")
