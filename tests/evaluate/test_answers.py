"""Finding the answer in a response."""

import json
import re
from pathlib import Path

import pytest

from mlx_adapters.evaluate.answers import EXTRACTIONS, correct, extract
from mlx_adapters.evaluate.choices import KINDS, WORDS, Kind, parse

SETS = Path(__file__).parents[3] / "shared" / "data" / "test"
QUESTION = "How far? Answer Choices: (A) 5 (B) 5 km (C) 1,250 m (D) 33 1/3% (E) none of these"

NUMBERS = [
    ("The answer is 18.", "18"),
    ("The answer is $18.", "18"),
    ("The answer is 21,600.", "21600"),
    ("The answer is 40 feet.", "40"),
    ("The answer is 2.5 days.", "2.5"),
    ("2 + 3 = 5\nThe answer is 5.0", "5.0"),
    ("so $2 - $6 = -$4", "-4"),
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
    ("2-3", "3"),
    ("at 10:30", "30"),
    ("1/2", "0.5"),
    ("I do not know.", None),
    ("", None),
    ("twelve", None),
    (".5", "0.5"),
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


# (response, strict, paper). Most were said by SmolLM2-135M-Instruct to items of the sets, some shortened.
TRUTH = [
    ("True.", "true", None),
    ("the correct answer is true", "true", "true"),
    ("the correct answer is false", "false", "false"),
    ('The answer is "True"', "true", None),
    ('The answer is "true"', "true", "true"),
    ("True.\n\nThe answer is true because it is a product of a cream.", "true", "true"),
    ("The answer is indeed true. The survey is non-partisan.", "true", "true"),
    ("The answer is yes.\n\nThe answer is no.", None, None),
    ("The answer is yes.\n\nThe answer is yes.\n\n### Response:\nThe answer is no.", "true", None),
    ("The answer is true.\n\nThe answer is false.\n\n### Response:\nThe answer is false.", None, "true"),
    ("True: Yes, did Seber and Roebuck start by selling watches.", "true", None),
    ("False.\n\nThe answer is not true.\n\n### Explanation:\nThe answer is not true.", "false", "true"),
    ("The answer is indeed a zoo in Las Vegas, Nevada.", None, None),
    ("Yes, it is.", "true", None),
    ("No", "false", None),
    ("FALSE", "false", None),
    ("It is true that cats are loved, but the answer is false.", "false", "true"),
    ("Either true or false.", None, "true"),
    ("Nobody knows", None, None),
    ("untrue", None, "true"),
    ("This isn't true", None, "true"),
    ("**Answer:** true", "true", "true"),
    ("true\n\n### Instruction:\nNext? false", "true", "true"),
    ("", None, None),
]
SOLUTION = [
    ("the correct answer is solution1", "solution1", "solution1"),
    ("the correct answer is solution2", "solution2", "solution2"),
    ("The correct answer is: solution1.", "solution1", "solution1"),
    (
        "To open it,\n\nSolution1: twist the lid.\n\nThe correct answer is:\n\nSolution1: twist",
        "solution1",
        None,
    ),
    ("The correct answer is:\n\nSolution1: use a towel\n\nSolution2: use a spoon", "solution1", None),
    ('The answer to the question "boil an egg" is either "solution1" or "solution2".', None, "solution1"),
    ('The answer to the question "How to open a jar?" is "twist the lid."', "solution1", None),
    ("The correct answer is:\n\nBoil an egg", None, None),
    ("Solution 2", "solution2", None),
    ("Solution2", "solution2", None),
    ("The correct solution is 2.", "solution2", None),
    ("2", None, None),
    ("The answer is (2)", "solution2", None),
    ("The answer is 2.5 litres", None, None),
    ("The answer is 2 litres", None, None),
    ("not solution1", None, "solution1"),
    ("solution1 is wrong. The answer is solution2", "solution2", "solution1"),
    ("Hit the table.", "solution2", None),
    ("solution12", None, "solution1"),
    ("solution3", None, None),
    ("", None, None),
]
ANSWER = [
    ("the correct answer is answer3", "answer3", "answer3"),
    ('The answer to the question "After an eruption, it takes long" is answer4.', "answer4", "answer4"),
    ('The answer to the question "Both ants and aphids benefit" is indeed answer4.', "answer4", "answer4"),
    ("Answer3: a mineral", "answer3", None),
    ("The correct answer is answer4.\n\nThe correct answer is answer4.", "answer4", "answer4"),
    ("The correct answer is answer4: refraction.", "answer4", "answer4"),
    ("The correct answer is 2. The correct answer is 2.", "answer2", None),
    ("You've already identified the correct answer. The correct answer is: 4: salt.", "answer4", None),
    ("You've already identified the correct answer. The correct answer is:", None, None),
    ("The answer is 18.", None, None),
    ("The correct answer is: volvox.\n\nThe reason is that amoebas move.", "answer2", None),
    ("The answer is euglena", "answer3", None),
    ("Volvox or euglena", None, None),
    ("The correct answer is answer1.\n\nThe correct answer is answer2.", None, "answer1"),
    ("ANSWER 5", "answer5", None),
    ("answer1/answer2/answer3/answer4", None, "answer1"),
    ("Answer format: answer1", None, "answer1"),
    ("The answer is not answer1 but answer2", "answer2", "answer1"),
    ("(3)", None, None),
    ("The answer is **answer2**", "answer2", "answer2"),
    ("answer6", None, None),
    (
        "the correct answer is answer3\n\n### Instruction:\nthe correct answer is answer1",
        "answer3",
        "answer3",
    ),
    ("", None, None),
]
ENDING = [
    ("the correct answer is ending2", "ending2", "ending2"),
    ("the correct answer is ending4", "ending4", "ending4"),
    ("The answer is: \nEnding4: throws the ball.", "ending4", None),
    ("The answer is:\n\nEnding4: runs.", "ending4", None),
    ("A man ties his shoes. He sings a song.", "ending3", None),
    ("She turns on the water. He sings a song. She throws the ball.", None, None),
    ("Ending 1", "ending1", None),
    ("The correct ending is ending3", "ending3", "ending3"),
    ("The correct ending is 3", "ending3", None),
    ("The best ending is Ending1: turns on the water.", "ending1", None),
    ("ending1 or ending2", None, "ending1"),
    ("ending5", None, None),
    ("He never stops.", None, None),
    ("ending3.", "ending3", "ending3"),
    ('"ending3"', "ending3", "ending3"),
    ("turns on the water", "ending1", None),
    ("The ending is sad", None, None),
    ("Answer: ending2", "ending2", "ending2"),
    ("not ending4, it is ending1", "ending1", "ending4"),
    ("the correct answer is ending2the correct answer", None, "ending2"),
    ("", None, None),
]
OPTION = [
    ("the correct answer is option1", "option1", "option1"),
    ("the correct answer is option2", "option2", "option2"),
    ("The correct answer is: Option1: box.", "option1", None),
    ("The correct answer is: Option1.\n\nThe correct answer is: Option2.", None, None),
    ("Tom Option2: Sam Answer format: option1", "option2", "option1"),
    (
        "The answer format is option1. The answer is the box.\n\nThe answer format is option2.",
        "option1",
        "option1",
    ),
    ("The cat sat on the mat.", None, None),
    ("box", "option1", None),
    ("The bag", "option2", None),
    ("The box, not the bag", None, None),
    ('The answer is that to the question "The box did not fit into the bag, the _ was big."', None, None),
    ("The box did not fit into the bag, the bag was big.", None, None),
    ("Option 2.", "option2", None),
    ("option2", "option2", "option2"),
    ("The answer is option 1", "option1", None),
    ("The answer is 1", "option1", None),
    ("The correct option is 2", "option2", None),
    ("Answer: 2", "option2", None),
    ("Answer: 2 bags", None, None),
    ("option1 option1", "option1", "option1"),
    ("option3", None, None),
    ("Both", None, None),
    ("", None, None),
]
ASKED = {
    "true/false": "Please answer the following question with true or false, question: is it?\n\n"
    "Answer format: true/false",
    "solution": "Please choose the correct solution to the question: How to open a jar?\n\n"
    "Solution1: twist the lid.\n\nSolution2: hit the table.\n\nAnswer format: solution1/solution2",
    "answer": "Please choose the correct answer to the question: Which one is a colony?\n\n"
    "Answer1: amoeba Answer2: volvox Answer3: euglena Answer4: paramecium\n\n"
    "Answer format: answer1/answer2/answer3/answer4",
    "ending": "Please choose the correct ending to complete the given sentence: Washing: A woman stands.\n\n"
    "Ending1: turns on the water. Ending2: rides a horse. Ending3: sings a song. Ending4: throws it.\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "option": "Please choose the correct answer to fill in the blank to complete the given sentence: "
    "The box did not fit into the bag, the _ was big.\n\nOption1: box Option2: bag "
    "Answer format: option1/option2",
}
CHOICES: list[tuple[Kind, str, str | None, str | None]] = [
    (kind, *row)
    for kind, rows in (
        ("true/false", TRUTH),
        ("solution", SOLUTION),
        ("answer", ANSWER),
        ("ending", ENDING),
        ("option", OPTION),
    )
    for row in rows
]


def test_every_kind_has_twenty_outputs() -> None:
    counts = {kind: sum(row[0] == kind for row in CHOICES) for kind in WORDS}
    counts |= {"number": len(NUMBERS), "letter": len(LETTERS)}
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 20


@pytest.mark.parametrize(("kind", "response", "strict", "paper"), CHOICES)
def test_choice(kind: Kind, response: str, strict: str | None, paper: str | None) -> None:
    assert extract(response, kind, question=ASKED[kind]) == strict
    assert extract(response, kind, how="paper", question=ASKED[kind]) == paper


def test_choices_are_read_from_the_instruction() -> None:
    found = parse(ASKED["answer"], "answer")
    assert found is not None
    assert found.question == "Which one is a colony?"
    assert found.texts["answer4"] == "paramecium"
    assert list(found.texts) == ["answer1", "answer2", "answer3", "answer4"]
    letters = parse(QUESTION, "letter")
    assert letters is not None
    assert (letters.question, letters.texts["C"], letters.texts["E"]) == (
        "How far?",
        "1,250 m",
        "none of these",
    )
    assert parse("How many?", "number") is None
    assert parse("Is it so?", "answer") is None
    blank = parse(ASKED["option"], "option")
    assert blank is not None
    assert blank.question == "The box did not fit into the bag, the _ was big."
    assert blank.texts == {"option1": "box", "option2": "bag"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ARC-Easy", "answer"), ("ARC-Challenge", "answer"), ("openbookqa", "answer"), ("boolq", "true/false")],
)
def test_published_outputs_give_their_labels_by_both_rules(name: str, kind: Kind) -> None:
    for row in stored(name):
        for how in EXTRACTIONS:
            assert extract(row["output"], kind, how=how, question=row["instruction"]) == row["answer"]


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
