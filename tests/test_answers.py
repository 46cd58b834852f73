"""Finding the answer in a response."""

import json
import re
from pathlib import Path

import pytest

from mlx_adapters.evaluate.answers import correct, extract

SETS = Path(__file__).parents[2] / "shared" / "data" / "test"
QUESTION = "How far? Answer Choices: (A) 5 (B) 5 km (C) 1,250 m (D) 33 1/3% (E) none of these"

NUMBERS = [
    ("The answer is 18.", "18"),
    ("The answer is $18.", "18"),
    ("The answer is 21,600.", "21600"),
    ("The answer is 40 feet.", "40"),
    ("The answer is 2.5 days.", "2.5"),
    ("2 + 3 = 5\nThe answer is 5.0", "5.0"),
    ("so $2 - $6 = -$4", "4"),
    ("He lost: -4", "-4"),
    ("-0.75", "-0.75"),
    ("7", "7"),
    ("7.", "7"),
    ("It is 10% of 50, so 5", "5"),
    ("1,234,567.89 dollars", "1234567.89"),
    ("He has 3 apples and 4 pears", "4"),
    ("= 3*4 = 12", "12"),
    ("\\boxed{42}", "42"),
    ("**42**", "42"),
    ("2-3", "-3"),
    ("at 10:30", "30"),
    ("1/2", "2"),
    ("I do not know.", None),
    ("", None),
    ("twelve", None),
    (".5", "5"),
    ("The answer is 5.\n\n### Instruction:\nWhat is 9 + 9?", "5"),
    ("The answer is 5.\n### Response:\n18", "5"),
]

LETTERS = [
    ("The answer is (B).", "B"),
    ("The answer is B.", "B"),
    ("the answer is (b)", "B"),
    ("The answer is b.", "B"),
    ("Answer: C", "C"),
    ("Answer: (C) 1,250 m", "C"),
    ("The correct answer is option D.", "D"),
    ("The correct option is D", "D"),
    ("The answer is **E**", "E"),
    ("The answer is A because 2 + 2 = 4", "A"),
    ("Because All Distances Add up, the answer is (D).", "D"),
    ("(A) is wrong. The answer is (C).", "C"),
    ("The answer is (A). No, the answer is (E).", "E"),
    ("B", "B"),
    ("B)", "B"),
    ("(E)", "E"),
    ("C.", "C"),
    ("So we choose D", "D"),
    ("Because of that it is 5 km.", "B"),
    ("The answer is 5.", "A"),
    ("It must be 1250 m", "C"),
    ("Each gets none of these", "E"),
    ("The answer is a number we cannot know", None),
    ("A train goes far", None),
    ("Because", None),
    ("I don't know", None),
    ("", None),
    ("The answer is (C).\n\n### Instruction:\nNext. The answer is (A).", "C"),
]

PAPER_LETTERS = [
    ("The answer is (B).", "B"),
    ("All in all the answer is (C).", "A"),
    ("Because of that: D", "B"),
    ("Distance", "D"),
    ("the answer is b", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "expected"), NUMBERS)
def test_number(response: str, expected: str | None) -> None:
    assert extract(response, "number") == expected


@pytest.mark.parametrize(("response", "expected"), LETTERS)
def test_strict_letter(response: str, expected: str | None) -> None:
    assert extract(response, "letter", question=QUESTION) == expected


@pytest.mark.parametrize(("response", "expected"), PAPER_LETTERS)
def test_paper_letter_is_the_first_capital_anywhere(response: str, expected: str | None) -> None:
    assert extract(response, "letter", how="paper", question=QUESTION) == expected


def test_paper_number_reads_on_to_the_next_response_marker() -> None:
    response = "5\n### Instruction:\n9 + 9\n### Response:\n18"
    assert extract(response, "number", how="paper") == "9"
    assert extract(response, "number") == "5"


def test_an_option_text_that_fits_two_options_is_no_answer() -> None:
    assert extract("red or blue", "letter", question="? Answer Choices: (A) red (B) blue") is None


@pytest.mark.parametrize(
    ("extracted", "label", "expected"),
    [
        ("18", "18.0", True),
        ("18.0009", "18", True),
        ("18.002", "18", False),
        ("-18", "18", False),
        (None, "18", False),
        ("0", "0.0", True),
    ],
)
def test_numbers_are_compared_within_a_thousandth(extracted: str | None, label: str, expected: bool) -> None:
    assert correct("number", extracted, label) is expected


def test_letters_are_compared_exactly() -> None:
    assert correct("letter", "B", "B")
    assert not correct("letter", "B", "C")
    assert not correct("letter", None, "A")


def stored(name: str) -> list[dict[str, str]]:
    file = SETS / name / "test.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here: published test sets are not part of the project")
    rows: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


@pytest.mark.parametrize("name", ["gsm8k", "SVAMP", "MultiArith"])
def test_real_outputs_that_state_a_number(name: str) -> None:
    stated = re.compile(r"The answer is [^\d\n-]*(-?[\d,]*\.?\d+)[^\d\n]*$")
    hits = 0
    for row in stored(name):
        found = stated.search(row["output"])
        if found:
            hits += 1
            answer = extract(row["output"], "number")
            assert answer is not None
            assert float(answer) == float(found[1].replace(",", "")), row["output"]
    assert hits > 500


def test_real_aqua_outputs_score_as_measured_by_hand_with_both_rules() -> None:
    rows = stored("AQuA")
    share = {}
    for how in ("strict", "paper"):
        found = [extract(row["output"], "letter", how=how, question=row["instruction"]) for row in rows]
        share[how] = sum(correct("letter", a, row["answer"]) for a, row in zip(found, rows, strict=True))
    assert share == {"strict": 123, "paper": 109}  # 48.4 % and 42.9 % of 254, as in the published analysis
