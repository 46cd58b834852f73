"""How answers are read: a table with reasons, formats that change nothing, and the paper's rule."""

import random
import re
import string

import paper_rule
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_adapters.evaluate.answers import correct, extract
from mlx_adapters.evaluate.choices import KINDS, Kind

LIST = "(A) 5 (B) 5 km (C) 1,250 m (D) 33 1/3% (E) none of these"
LINES = LIST.replace(" (", "\n(")
MATH_QA = "A ) 38 , B ) 27.675 , C ) 30 , D ) DAtA inADEquAtE , E ) nonE oF thEsE"
FORMS = "Answer1: amoeba Answer2: volvox Answer3: euglena Answer4: paramecium"
ASKED: dict[str, str] = {
    "letter": f"How far? Answer Choices: {LIST}",
    "mathqa": f"how far ? The options: {MATH_QA}",
    "answer": "Please choose the correct answer to the question: Which one is a colony?\n\n"
    f"{FORMS}\n\nAnswer format: answer1/answer2/answer3/answer4",
    "numbers": "Please choose the correct answer to the question: How many?\n\n"
    "Answer1: 2 Answer2: 4 Answer3: 6 Answer4: 8\n\nAnswer format: answer1/answer2/answer3/answer4",
    "true/false": "Please answer the following question with true or false, question: is it?\n\n"
    "Answer format: true/false",
}
# (question, response, expected, why)
LETTERS = [
    ("letter", "\\boxed{B}", "B", "a box states the answer"),
    ("letter", "$\\boxed{\\text{(B)}}$", "B", "whatever is in it"),
    ("letter", f"{LINES}\n\n\\boxed{{B}}", "B", "and wins over the options before it"),
    ("letter", "[C]", "C", "any bracket"),
    ("letter", f"{LIST}\n\n[C]", "C", "also after the options"),
    ("letter", "therefore C", "C", "a conclusion"),
    ("letter", "Therefore, C.", "C", "a conclusion"),
    ("letter", f"{LINES}\nIt should be C", "C", "a conclusion after the options"),
    ("letter", "I'd go with (D).", "D", "a choice"),
    ("letter", "C is correct, A is not.", "C", "the letter first"),
    ("letter", "b", "B", "alone, a small letter is a label"),
    ("letter", "(b)", "B", "alone, a small letter is a label"),
    ("letter", f"{LIST}\nb", "B", "alone on the last line"),
    ("letter", "**B**\n\nBecause (A) is too short.", "B", "alone on the first line"),
    ("letter", "B) 5 km", "B", "with its own text"),
    ("letter", "The answer is 5 km.", "B", "an option's text, and the longer one of two"),
    ("letter", f"{LIST} The answer is 5 km.", "B", "an option's text after the options"),
    ("letter", "The answer is none of these, because A is short", "E", "the text comes at once"),
    ("letter", LIST, None, "the options again are no answer"),
    ("letter", LINES, None, "nor one on each line"),
    ("letter", f"Answer: {LIST}", None, "nor after a heading"),
    ("letter", "(A) 5 (B) 5 km (C) 1,250 m (D) 33", None, "nor when cut short: D is not meant"),
    ("letter", "A\nB\nC\nD\nE", None, "nor the letters alone"),
    ("letter", "The answer is A or B.", None, "two are none"),
    ("letter", "(B)(C)", None, "two are none"),
    ("letter", "The answer is not (B).", None, "what it is not does not tell what it is"),
    ("letter", "A and B are wrong.", None, "what it is not does not tell what it is"),
    ("letter", "(A) is wrong, so it is (C).", "C", "the only one not denied"),
    ("letter", "The answer is (A). No, the answer is (E).", "E", "reasoning corrects itself"),
    ("letter", "Answer: A train needs an hour", None, "an article is no label"),
    ("letter", "The answer is A because it fits", "A", "this one is a label"),
    ("letter", "A:", None, "short for Answer"),
    ("letter", "It leaves at 5.02 A.M. and comes at 6 P.M.", None, "no letters of their own"),
    ("letter", "The answer is 1250.", "C", "the only option with that number"),
    ("letter", "The answer is 33.", None, "an option with that number and others"),
    ("letter", "Ｂ", "B", "full width"),
    ("mathqa", "the answer is B ) 27.675", "B", "MathQA's own writing"),
    ("mathqa", "data inadequate", "D", "MathQA's options before a-f became capitals"),
    ("mathqa", MATH_QA, None, "the options again"),
    ("mathqa", f"{MATH_QA}\n\nanswer : c", "C", "stated after the options"),
]
WORDS = [
    ("answer", FORMS, None, "the options again are no answer"),
    ("answer", f"{FORMS}\n\nThe correct answer is answer2", "answer2", "stated after the options"),
    ("answer", f"{FORMS} The answer is volvox.", "answer2", "an option's text after the options"),
    ("answer", f"{FORMS}\nvolvox", "answer2", "an option's text after the options"),
    ("answer", "Answer1: amoeba Answer2: volvox Answer3: eug", None, "the options again, cut short"),
    ("answer", "\\boxed{3}", "answer3", "a box states the answer"),
    ("answer", "\\boxed{\\text{answer3}}", "answer3", "a box states the answer"),
    ("answer", "[answer3]", "answer3", "any bracket"),
    ("answer", "It should be 3.", None, "a number that nothing calls an answer"),
    ("numbers", "The answer is 4.", "answer2", "the choice that says 4, not answer4"),
    ("numbers", "The answer is answer4.", "answer4", "the label"),
    ("numbers", "The answer is 3", "answer3", "no choice says 3"),
    ("answer", "The correct answer is 2 because it is", "answer2", "a reason follows"),
    ("answer", "The correct answer is 2\nThe reason is that", "answer2", "a line ends the sentence"),
    ("answer", "The answer is 2 metres", None, "a quantity is no label"),
    ("answer", "The answer is answer1 or answer2", None, "two are none"),
    ("answer", "answer1 is wrong. answer2", "answer2", "the only one not denied"),
    ("true/false", "\\boxed{True}", "true", "a box states the answer"),
    ("true/false", "[False]", "false", "any bracket"),
    ("true/false", "true/false", None, "two are none"),
    ("true/false", "The answer is not true.\n\nFalse", "false", "the only one not denied"),
    ("true/false", "The answer is **No**.", "false", "yes and no answer too"),
    ("true/false", "Yes it is", "true", "yes and no answer too"),
    ("true/false", "No idea", None, "but this does not"),
    ("true/false", "The answer is no one's business", None, "nor this"),
]
NUMBERS = [
    ("The answer is .5", "0.5", "a point in front"),
    ("It costs $.75.", "0.75", "a point in front, behind a currency"),
    ("It costs Rs.35", "35", "the point of an abbreviation"),
    ("The answer is \u22123.", "-3", "U+2212, the minus sign"),
    ("it is \u20133 degrees", "-3", "an en dash for a minus"),
    ("The change is -$4", "-4", "a sign before the currency"),
    ("x = - 3", "-3", "a sign apart from its number"),
    ("That is 1 200 apples", "1200", "thousands parted by a blank"),
    ("That is 1\u202f200 apples", "1200", "by a narrow one"),
    ("$1{,}200$", "1200", "LaTeX's comma"),
    ("1,234,567.89 dollars", "1234567.89", "thousands and a fraction"),
    ("about 2.5e3", "2500", "an exponent"),
    ("2.5 \\times 10^{3}", "2500", "an exponent in LaTeX"),
    ("3-4 hours, so at most 3-4", "4", "a range has no sign"),
    ("between 3\u20134", "4", "a range has no sign"),
    ("5 - 3", "3", "nor has a subtraction"),
    ("- 5 apples", "5", "nor a bullet"),
    ("The final answer is 1/2", "0.5", "a fraction"),
    ("\\boxed{\\frac{3}{4}}", "0.75", "a fraction in LaTeX"),
    ("1 1/2 cups, and 1½", "1.5", "a mixed number"),
    ("on 3/4/2024", "2024", "a date is no fraction"),
    ("The area is 18 m^2", "18", "an exponent of a unit"),
    ("The area is 18 m²", "18", "an exponent of a unit"),
    ("The volume is 18 cm3", "18", "an exponent of a unit"),
    ("2^3", "8", "a power"),
    ("5 kg of CO2", "5", "a digit of a word"),
    ("The answer is 5. That is 3 more than 2.", "5", "stated, whatever follows"),
    ("The answer is 5 + 3 = 8.", "8", "the result of an equation"),
    ("The answer is 40 feet (40 = 5 * 8).", "40", "but not of a remark"),
    ("The answer is the sum of 3 and 4, which is 7.", "7", "the end of the sentence"),
    ("#### 18\nThat took 3 steps", "18", "GSM8K's mark"),
    ("The answer is not 5.", "5", "the last number where none is stated"),
    ("1e999", "1e999", "too large for a float, and no error"),
    ("5/0", "5", "no error"),
]


@pytest.mark.parametrize(("asked", "response", "expected", "why"), LETTERS + WORDS)
def test_a_label_is_read_as_it_is_stated(asked: str, response: str, expected: str | None, why: str) -> None:
    kinds: dict[str, Kind] = {"letter": "letter", "mathqa": "letter", "true/false": "true/false"}
    kind = kinds.get(asked, "answer")
    assert extract(response, kind, question=ASKED[asked]) == expected, why


@pytest.mark.parametrize(("response", "expected", "why"), NUMBERS)
def test_a_number_is_read_as_a_person_reads_it(response: str, expected: str, why: str) -> None:
    assert extract(response, "number") == expected, why


def test_half_is_not_five() -> None:
    assert correct("number", extract("The answer is .5", "number"), "0.5")
    assert not correct("number", extract("The answer is .5", "number"), "5")
    assert not correct("number", extract("1e999", "number"), "5")


def latex(text: str) -> list[str]:
    forms = ("\\boxed{%s}", "$\\boxed{%s}$", "\\(\\boxed{\\text{%s}}\\)", "\\textbf{%s}")
    return [form % text for form in forms]


WRAPPED = [
    *("{}", "**{}**", "*{}*", "_{}_", "__{}__", "`{}`", '"{}"', "'{}'", "\u201c{}\u201d", "({})", "[{}]"),
    *("**({})**", "<b>{}</b>", "<answer>{}</answer>", "\n\n{}", "\n\n**{}**", "$ {} $"),
]
BEFORE = [
    *("The answer is {}", "the answer is: {}", "So the correct answer is {}", "**Answer:** {}"),
    *("Answer: {}", "The final answer is\n{}"),
]
AFTER = ["", ".", "!", "\n", ".\n\nI hope this helps.", " .", ";", ". This is right because it says so."]
ANSWERS: dict[Kind, list[str]] = {
    "letter": list("ABCDE"),
    "answer": [f"answer{n}" for n in range(1, 6)],
    "option": ["option1", "option2"],
    "ending": ["ending1", "ending4"],
    "solution": ["solution1", "solution2"],
    "true/false": ["true", "false", "True", "FALSE"],
    "number": ["5", "-3", "0.25", ".5", "1,200", "2.5e3", "1/2"],
}
VALUES = {".5": "0.5", "1,200": "1200", "2.5e3": "2500", "1/2": "0.5"}


@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_stated_answer_survives_formatting(kind: Kind, data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from(ANSWERS[kind]))
    wrapped = data.draw(st.sampled_from([form.format(answer) for form in WRAPPED] + latex(answer)))
    said = data.draw(st.sampled_from(BEFORE)).format(wrapped) + data.draw(st.sampled_from(AFTER))
    if kind in ASKED and data.draw(st.booleans()):
        said = f"{ASKED[kind]}\n\n{said}"  # the question again, with its options
    expected = VALUES.get(answer, answer if kind == "letter" else answer.lower())
    assert extract(said, kind, question=ASKED.get(kind, "")) == expected


PIECES = [
    *re.findall(r"\S+|\s", f"{LIST} {LINES} {MATH_QA} {FORMS}"),
    *(
        "The answer is ",
        "\\boxed{",
        "}",
        " or ",
        " not ",
        "therefore ",
        "**",
        "A",
        "b",
        "answer2",
        "true",
        "no",
    ),
    *("9" * 400, "^", "/0", "e999", "1 200", "\u2212", "½", "\n", "Ｂ", "İ", "ß"),
]


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    said=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)),
)
def test_any_text_is_read_without_an_error(kind: Kind, said: str) -> None:
    for how in ("strict", "paper"):
        answer = extract(said, kind, how=how, question=ASKED.get(kind, ""))  # type: ignore[arg-type]
        correct(kind, answer, "1" if kind == "number" else "A")


SPOKEN = [
    *("the correct answer is {}", "The answer is {}.", "{}", "not {} but {}", "1,0{}5.{}", "Is it {}? {}"),
    "Because of that, {} is right. All in all, {}",
    "So {} - 2 = {}.\n\n### Response:\n{}",
    "### Instruction:\n{}\n\n### Response:\n{}",
    "nobody knows",
]


def mutated(kind: Kind, count: int) -> list[str]:
    """Outputs of the paper's kind, each changed in up to four places."""
    draw = random.Random(f"{kind} 18")
    numbers = [str(draw.randint(-50, 5000) / draw.choice([1, 4, 10])) for _ in range(40)]
    words = paper_rule.WORDS.get(kind, numbers)
    pieces = [*words, *string.ascii_letters, *"0123456789.,-+/ \n", *"\u0663\u2212½²", "###", " Response:"]
    texts = []
    for _ in range(count):
        text = draw.choice(SPOKEN)
        while "{}" in text:
            text = text.replace("{}", draw.choice(words), 1)
        for _ in range(draw.randint(0, 4)):
            place = draw.randint(0, len(text))
            text = text[:place] + draw.choice([*pieces, ""]) + text[place + draw.randint(0, 2) :]
        texts.append(text)
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_reading_equals_the_papers_functions(kind: Kind) -> None:
    """2,000 mutated outputs of each kind, against the functions written again by hand."""
    texts, read, verdicts = mutated(kind, 2000), 0, set()
    labels = paper_rule.WORDS.get(kind, ["5", "-0.5", "1005"])
    for number, text in enumerate(texts):
        theirs, ours = paper_rule.found(text, kind), extract(text, kind, how="paper")
        if ours is None:
            assert theirs in ("", float("inf")), text
        else:
            read += 1
            assert theirs == (float(ours) if kind == "number" else ours), text
        label = labels[number % len(labels)] if number % 2 or ours is None else ours
        verdict = correct(kind, ours, label)
        assert verdict == paper_rule.right(text, kind, label), text
        verdicts.add(verdict)
    assert len(set(texts)) > 1000
    assert 1000 < read < 2000
    assert verdicts == {True, False}
