"""From a test set's file to the table: prompt, the model's text, both readings, verdict and report.

A stand-in writes the model's text. Each set has one right, one wrong and one unreadable answer, and the
paper's verdicts are those of its rule written again by hand (paper_rule.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paper_rule
import pytest
from command_line import cli
from tiny import make_tiny

from mlx_adapters.errors import DataError
from mlx_adapters.evaluate import ask, tasks
from mlx_adapters.evaluate.ask import Asking, answer
from mlx_adapters.evaluate.choices import Kind
from mlx_adapters.evaluate.config import CHOICES
from mlx_adapters.evaluate.score import Record, none_right, summarise, table
from mlx_adapters.evaluate.tasks import Item, Task

SETS = [task for task in tasks.TASKS if task.name != tasks.GENERATED]
# of each kind: labels of three items; what is said to them, in the paper's form; choices of an item
SAID: dict[Kind, tuple[list[str], list[str], list[str]]] = {
    "number": (["5", "-2.0", "1200"], ["2 + 3 = 5. The answer is 5.", "The answer is 2.", "None."], []),
    "letter": (["B", "C", "E"], ["the answer is (B).", "the answer is (A).", "no idea"], [*"vwxyz"]),
    "true/false": (["true", "false", "true"], [], []),
    "solution": (["solution1", "solution2", "solution2"], [], ["v", "w"]),
    "answer": (["answer1", "answer3", "answer2"], [], ["v", "w", "x"]),
    "ending": (["ending4", "ending1", "ending2"], [], ["v", "w", "x", "y"]),
    "option": (["option2", "option1", "option2"], [], ["v", "w"]),
}


def texts(kind: Kind) -> list[str]:
    """A right, a wrong and an unreadable answer."""
    labels, said, _ = SAID[kind]
    if kind in ("number", "letter"):
        return said
    wrong = next(word for word in paper_rule.WORDS[kind] if word != labels[1])
    return [f"the correct answer is {labels[0]}", f"the correct answer is {wrong}", "no idea at all"]


def question(task: Task, number: int) -> str:
    """An instruction as the set's own are."""
    kind, choices = task.kind, SAID[task.kind][2]
    if kind == "number":
        return f"How many are {task.name} {number} ?"
    if task.name == "mathqa":
        listed = " , ".join(f"{letter} ) {text}" for letter, text in zip("ABCDE", choices))
        return f"how far is {number} ? The options: {listed}"
    if kind == "letter":
        return f"How far is {number}? Answer Choices: " + " ".join(
            f"({letter}) {text}" for letter, text in zip("ABCDE", choices)
        )
    form = "/".join(paper_rule.WORDS[kind][: len(choices) or 2])
    if kind == "true/false":
        ask = "Please answer the following question with true or false, question:"
        return f"{ask} is {number} so?\n\nAnswer format: {form}"
    marked = " ".join(f"{kind.capitalize()}{n}: {text}" for n, text in enumerate(choices, start=1))
    ask = f"Please choose the correct {kind} to the question: Which {number}?"
    return f"{ask}\n\n{marked}\n\nAnswer format: {form}"


def write(folder: Path, task: Task) -> None:
    rows = [
        {"instruction": question(task, number), "input": "", "output": "", "answer": label}
        for number, label in enumerate(SAID[task.kind][0])
    ]
    (folder / task.name).mkdir(parents=True)
    (folder / task.name / "test.json").write_text(json.dumps(rows))


class Says:
    """Stands for the model: what it says to the items of each call, and with what options it was called."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.options = list(answers), list[dict[str, Any]]()

    def __call__(
        self, model: Any, tokenizer: Any, prompts: dict[int, Any], **options: Any
    ) -> Iterator[tuple[int, str]]:
        self.options.append(options)
        said = self.answers.pop(0)
        yield from ((index, said[index]) for index in reversed(prompts))


class Letters:
    """A tokenizer of one id for each character."""

    bos_token, eos_token, eos_token_id = None, "\0", 0

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(map(ord, text))


def answered(monkeypatch: pytest.MonkeyPatch, task: Task, items: list[Item], said: list[str]) -> list[Record]:
    monkeypatch.setattr(ask, "generate_texts", Says(said))
    records = answer(None, Letters(), task, items, Asking(template="alpaca"))  # type: ignore[arg-type]
    return sorted(records, key=lambda record: record.index)


@pytest.mark.parametrize("task", SETS, ids=lambda task: task.name)
def test_every_set_counts_one_right_one_wrong_and_one_unreadable_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    write(tmp_path, task)
    ((found, items),) = tasks.load(task.name, data_dir=tmp_path)
    said = texts(task.kind)
    records = answered(monkeypatch, found, items, said)
    assert all(question(task, record.index) in record.prompt for record in records)
    assert [record.response for record in records] == said
    assert [record.correct for record in records] == [True, False, False]
    assert [record.strict_correct for record in records] == [True, False, False]
    assert [record.extracted is None for record in records] == [False, False, True]
    theirs = [paper_rule.right(text, task.kind, item.label) for text, item in zip(said, items, strict=True)]
    assert [record.paper_correct for record in records] == theirs == [True, False, False]
    score = summarise(records)
    assert (score.correct, score.total, score.unanswered) == (1, 3, 1)
    assert (score.strict_correct, score.paper_correct) == (1, 1)
    heads, (row,) = table([score])
    cells = dict(zip(heads, row, strict=True))
    assert (cells["accuracy"], cells["correct"], cells["paper's rule"]) == ("33.3%", "1/3", "33.3%")
    assert none_right(score) is None


@pytest.mark.parametrize("task", [one for one in SETS if one.kind != "number"], ids=lambda task: task.name)
@pytest.mark.parametrize("scored", CHOICES)
def test_every_set_with_choices_is_scored_by_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, scored: str
) -> None:
    """The likeliest choice is the right one of the first item and another one of the second."""
    write(tmp_path, task)
    ((found, items),) = tasks.load(task.name, data_dir=tmp_path)
    items = items[:2]
    labels = paper_rule.WORDS[task.kind][: len(SAID[task.kind][2]) or 2]
    wrong = next(label for label in labels if label != items[1].label)

    def likelihoods(model: Any, encoded: Any, **_: Any) -> Iterator[tuple[int, list[float]]]:
        assert [len(choices) for _, choices in encoded.values()] == [len(labels)] * 2
        for place, label in enumerate((items[0].label, wrong)):
            yield place, [-1.0 if one == label else -50.0 for one in labels]

    monkeypatch.setattr(ask, "loglikelihoods", likelihoods)
    asking = Asking(template="alpaca", decoding=None, choices=scored)
    records = list(answer(None, Letters(), found, items, asking))  # type: ignore[arg-type]
    assert [record.extracted for record in records] == [items[0].label, wrong]
    assert [record.correct for record in records] == [True, False]
    assert set(records[0].loglikelihoods or {}) == set(labels)


OWN = [  # answers as users write them, what is said, verdicts counted by hand
    ([True, False, True], ["True.", "The answer is yes", "maybe"], [True, False, False]),
    (["True", " FALSE ", "true"], ["true", "False", "false"], [True, True, False]),
    (["Answer1", "answer3 ", "ANSWER5"], ["answer1", "Answer 3.", "answer4"], [True, True, False]),
    (["Option1", " option2"], ["The answer is option1", "option 1"], [True, False]),
    (["Solution2", "solution1"], ["**solution2**", "solution2"], [True, False]),
    (["Ending4", "ending2"], ["ending4", "ending1"], [True, False]),
    ([" a ", "B", "c\n"], ["The answer is (A).", "b", "The answer is D."], [True, True, False]),
    ([7, " 1,200 ", "-0.5", "3.0"], ["7", "1 200", "\u22121/2", "It is 4"], [True, True, True, False]),
]


@pytest.mark.parametrize(("labels", "said", "verdicts"), OWN)
def test_labels_of_an_own_file_count_in_any_case_and_with_blanks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[Any], said: list[str], verdicts: list[bool]
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"question": "?", "answer": label}) + "\n" for label in labels))
    ((task, items),) = tasks.load(str(file))
    records = answered(monkeypatch, task, items, said)
    assert [record.correct for record in records] == verdicts
    by_hand = [Item(item.instruction, "", str(label)) for item, label in zip(items, labels, strict=True)]
    assert answered(monkeypatch, task, by_hand, said) == records  # labels that no file's reader has seen


def test_an_item_made_by_hand_with_a_label_of_another_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="boolq: item 1: 'answer1' is no answer of the kind true/false"):
        answered(
            monkeypatch, tasks.find("boolq"), [Item("?", "", "True"), Item("?", "", "answer1")], ["", ""]
        )


# The command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for task in SETS:
        write(folder, task)
    return folder


def test_the_command_counts_all_sixteen_sets(
    model: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["eval", model, "--task", ",".join(task.name for task in SETS), "--data-dir", sets]
    monkeypatch.setattr(ask, "generate_texts", Says(*(texts(task.kind) for task in SETS)))
    shown = cli(*run).stdout
    for task in SETS:
        cells = next(line.split() for line in shown.splitlines() if line.split()[:1] == [task.name])
        assert cells[1] == "33.3%", cells
        assert "1/3" in cells
    assert "wrong" not in shown
    monkeypatch.setattr(ask, "generate_texts", Says(*(texts(task.kind) for task in SETS)))
    found = json.loads(cli(*run, "--json").stdout)
    assert found["reading"] == "strict 3"
    for task, score in zip(SETS, found["scores"], strict=True):
        counted = {"task": task.name, "correct": 1, "total": 3, "paper_correct": 1, "unanswered": 1}
        assert counted.items() <= score.items()


def test_a_set_with_nothing_right_says_so_under_the_table(
    model: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Says(
        ["no idea"] * 3, ["solution2", "solution1", "no idea"], ["Option A", "A?", "All"], ["5", "2", "5"]
    )
    monkeypatch.setattr(ask, "generate_texts", said)
    text = cli("eval", model, "--task", "boolq,piqa,AQuA,SVAMP", "--data-dir", sets).stdout
    shown = [line.strip() for line in text.partition("Next:")[0].splitlines() if line.strip()]
    assert shown[-3].startswith(
        "boolq: no answer could be read in any of its 3 responses. Look at the responses"
    )
    assert shown[-2].startswith("piqa: all of its 3 answers are wrong, 1 because none could be read. Look")
    assert shown[-1].startswith("AQuA: all of its 3 answers are wrong, 1 because none could be read. Look")
    assert shown[-4].startswith("mean")
    assert shown[-5].startswith("SVAMP")


def test_the_papers_protocol_is_one_flag(model: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Says(["All in all, the answer is (B)."] * 3, texts("true/false"))
    monkeypatch.setattr(ask, "generate_texts", said)
    run = ["eval", model, "--task", "AQuA,boolq", "--data-dir", sets, "--protocol", "paper"]
    found = json.loads(cli(*run, "--num-beams", 4, "--json").stdout)
    assert [(one["decoding"].kind, one["decoding"].beams) for one in said.options] == [("beam", 4)] * 2
    assert [one["max_tokens"] for one in said.options] == [256, 32]
    assert (found["template"], found["reading"], found["decoding"]) == ("llm-adapters", "paper", "beam")
    aqua = found["scores"][0]
    assert (aqua["correct"], aqua["paper_correct"], aqua["strict_correct"]) == (0, 0, 1)
    monkeypatch.setattr(
        ask, "generate_texts", Says(["All in all, the answer is (B)."] * 3, texts("true/false"))
    )
    shown = cli(*run).stdout
    assert "strict reading" in shown
    assert "AQuA: all of its 3 answers are wrong; 1 by the strict reading" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--decoding", "greedy"], "--decoding greedy contradicts --protocol paper, which uses beam"),
        (["--num-beams", 2], "--num-beams 2 contradicts --protocol paper, which uses 4"),
        (["--template", "alpaca"], "--template alpaca contradicts --protocol paper, which uses llm-adapters"),
        (["--max-tokens", 8], "--max-tokens 8 contradicts --protocol paper, which uses each set's own limit"),
    ],
)
def test_a_flag_that_contradicts_the_protocol_is_named(model: Path, flags: list[Any], words: str) -> None:
    said = cli("eval", model, "--task", "boolq", "--protocol", "paper", *flags, code=2).stderr
    assert words in said
    assert len(said.splitlines()) == 1


def test_an_unknown_protocol_is_named(model: Path) -> None:
    assert (
        "Did you mean 'paper'" in cli("eval", model, "--task", "boolq", "--protocol", "papr", code=2).stderr
    )
