"""Test sets from a folder, the hub's schemas and the generator; scoring them."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.evaluate import tasks
from mlx_adapters.evaluate.choices import parse
from mlx_adapters.evaluate.tasks import Item, find, from_rows, load_items

SETS = Path(__file__).parents[3] / "shared" / "data" / "test"


def write(folder: Path, name: str, content: Any) -> Path:
    file = folder / name / "test.json"
    file.parent.mkdir(parents=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def row(**changes: Any) -> dict[str, Any]:
    return {"instruction": "1 + 1?", "input": "", "output": "", "answer": "2.0", **changes}


def test_names_are_found_in_any_case_and_close_ones_suggested() -> None:
    assert [find(name).name for name in ("aqua", "GSM8K", "singleeq", "SVAMP")] == [
        "AQuA",
        "gsm8k",
        "SingleEq",
        "SVAMP",
    ]
    with pytest.raises(ConfigError, match="Did you mean 'gsm8k'"):
        find("gsm8")


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "4 * 300 = <<4*300=1200>>1200\n#### 1,200"},
            Item("How many?", "", "1200"),
        ),
        (
            "AQuA",
            {
                "question": "How far?",
                "options": ["A)21 km", "B)2(3)", "C)x"],
                "rationale": "",
                "correct": "B",
            },
            Item("How far? Answer Choices: (A) 21 km (B) 2 (3)  (C) x", "", "B"),
        ),
        (
            "SVAMP",
            {
                "ID": "chal-1",
                "Body": "He had 32 cakes initially",
                "Question": "How many now?",
                "Answer": 11.0,
            },
            Item("He had 32 cakes initially. How many now?", "", "11.0"),
        ),
        (
            "SVAMP",
            {"ID": "chal-2", "Body": "He had 32 cakes.", "Question": "How many now?", "Answer": "-1"},
            Item("He had 32 cakes. How many now?", "", "-1"),
        ),
        ("MultiArith", {"question": " How many? ", "final_ans": "15"}, Item(" How many? ", "", "15")),
        ("MultiArith", {"question": "How many?", "final_ans": "15"}, Item(" How many? ", "", "15")),
    ],
)
def test_hub_rows_become_the_same_questions(name: str, rows: dict[str, Any], expected: Item) -> None:
    assert from_rows(find(name), [rows]) == [expected]


# Rows written here in each data set's schema, with the text that LLM-Adapters makes of them.
COMMONSENSE: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "boolq",
        {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
        "Please answer the following question with true or false, question: is ice cold?\n\n"
        "Answer format: true/false",
        "true",
    ),
    (
        "piqa",
        {"goal": "Cool a drink", "sol1": "Add salt.", "sol2": "Add ice.", "label": 1},
        "Please choose the correct solution to the question: Cool a drink\n\nSolution1: Add salt.\n\n"
        "Solution2: Add ice.\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    (
        "social_i_qa",
        {
            "context": "Jo fell.",
            "question": "How does Jo feel?",
            "answerA": "hurt",
            "answerB": "fine",
            "answerC": "tall",
            "label": "1",
        },
        "Please choose the correct answer to the question: Jo fell. How does Jo feel?\n\nAnswer1: hurt "
        "Answer2: fine Answer3: tall\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    (
        "hellaswag",
        {
            "ind": 4,
            "activity_label": "Running",
            "ctx_a": "A man runs.",
            "ctx_b": "he",
            "ctx": "A man runs. he",
            "endings": ["flies.", "stops.", ", sings.", "[step] Eats."],
            "label": "3",
        },
        "Please choose the correct ending to complete the given sentence: Running: A man runs. he\n\n"
        "Ending1: flies. Ending2: stops. Ending3: , sings. Ending4: [step] Eats.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    (
        "winogrande",
        {"sentence": "The _ was big.", "option1": "box", "option2": "bag", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: The _ was big."
        "\n\nOption1: box Option2: bag Answer format: option1/option2",
        "option2",
    ),
    (
        "ARC-Easy",
        {
            "question": "Hot?",
            "choices": {"text": ["ice", "sun", "sea"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        "Please choose the correct answer to the question: Hot?\n\nAnswer1: ice Answer2: sun Answer3: sea\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    (
        "ARC-Challenge",
        {"question": "Hot?", "choices": {"text": ["ice", "sun"], "label": ["1", "2"]}, "answerKey": "1"},
        "Please choose the correct answer to the question: Hot?\n\nAnswer1: ice Answer2: sun\n\n"
        "Answer format: answer1/answer2",
        "answer1",
    ),
    (
        "openbookqa",
        {
            "question_stem": "The sun is",
            "choices": {"text": ["hot", "wet", "red", "low"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: The sun is\n\nAnswer1: hot Answer2: wet "
        "Answer3: red Answer4: low\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
    (
        "mathqa",
        {
            "Problem": "how far ?",
            "options": "a ) 38 , b ) rs . 1,200 , c ) ( a + b ) , d ) data inadequate , e ) 4 feet",
            "correct": "b",
        },
        "how far ? The options: A ) 38 , B ) rs . 1,200 , C ) ( A + B ) , D ) DAtA inADEquAtE , E ) 4 FEEt",
        "B",
    ),
    (
        "mathqa",
        {"Problem": "how far ?", "options": "['a ) 1', 'b ) 2', 'c ) 3', 'd ) 4', 'e ) 5']", "correct": "e"},
        "how far ? The options: ['A ) 1', 'B ) 2', 'C ) 3', 'D ) 4', 'E ) 5']",
        "E",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "instruction", "label"), COMMONSENSE)
def test_hub_rows_are_asked_in_the_papers_words(
    name: str, rows: dict[str, Any], instruction: str, label: str
) -> None:
    assert from_rows(find(name), [rows]) == [Item(instruction, "", label)]


def test_mathqas_options_are_read_from_its_prompt_as_they_were_before() -> None:
    for number, texts in (
        (-2, ["38", "rs . 1,200", "( a + b )", "data inadequate", "4 feet"]),
        (-1, [*"12345"]),
    ):
        name, rows, instruction, _ = COMMONSENSE[number]
        found = parse(from_rows(find(name), [rows])[0].instruction, "letter")
        assert found is not None
        assert found.question == "how far ?"
        assert found.texts == dict(zip("ABCDE", texts, strict=True))
        assert instruction.startswith("how far ? The options: ")


def published(name: str) -> list[dict[str, str]]:
    file = SETS / name / "test.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here: published test sets are not part of the project")
    found: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge", "openbookqa"])
def test_published_rows_taken_apart_and_put_into_the_hubs_schema_come_out_the_same(name: str) -> None:
    stem = "question_stem" if name == "openbookqa" else "question"
    for row in published(name):
        choices = parse(row["instruction"], "answer")
        assert choices is not None
        keys = "ABCDE"[: len(choices.texts)]
        hub_row = {
            stem: choices.question,
            "choices": {"text": list(choices.texts.values()), "label": list(keys)},
            "answerKey": keys[list(choices.texts).index(row["answer"])],
        }
        assert from_rows(find(name), [hub_row]) == [Item(row["instruction"], "", row["answer"])]


def test_published_boolq_and_aqua_rows_come_out_the_same() -> None:
    for row in published("boolq"):
        choices = parse(row["instruction"], "true/false")
        assert choices is not None
        hub_row = {"question": choices.question.removesuffix("?"), "answer": row["answer"] == "true"}
        assert from_rows(find("boolq"), [hub_row]) == [Item(row["instruction"], "", row["answer"])]
    for row in published("AQuA"):
        question, _, tail = row["instruction"].partition(" Answer Choices:")
        raw = tail.replace(" (", "(").replace(") ", ")")
        options = re.split(r"\((?=[A-E]\))", raw)[1:]
        hub_row = {"question": question, "options": options, "correct": row["answer"]}
        assert from_rows(find("AQuA"), [hub_row]) == [Item(row["instruction"], "", row["answer"])]


def test_published_multiarith_rows_come_out_the_same() -> None:
    for row in published("MultiArith"):
        hub_row = {"question": row["instruction"].strip(), "final_ans": row["answer"]}
        assert from_rows(find("MultiArith"), [hub_row]) == [Item(row["instruction"], "", row["answer"])]


def test_groups_are_the_papers_tables() -> None:
    assert len(tasks.GROUPS["all"]) == 14
    assert len(tasks.GROUPS["commonsense"]) == 8
    assert set(tasks.GROUPS["math"]) == {"gsm8k", "AQuA", "mawps", "SVAMP"}
    assert set(tasks.GROUPS["math-2023"]) == {"gsm8k", "AQuA", "SVAMP", "MultiArith", "AddSub", "SingleEq"}
    assert sum(find(name).items for name in tasks.GROUPS["commonsense"]) == 22419
    for members in tasks.GROUPS.values():
        assert [find(name).name for name in members] == list(members)


def test_tasks_groups_and_files_are_named_together(tmp_path: Path) -> None:
    for name in tasks.GROUPS["math"]:
        write(tmp_path, name, [row(answer="A" if name == "AQuA" else 2)])
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"question": "2 + 2?", "answer": 4}) + "\n")
    found = tasks.load(f"svamp, math,{own},", data_dir=tmp_path)
    assert [task.name for task, _ in found] == ["SVAMP", "gsm8k", "AQuA", "mawps", "own"]
    assert found[-1][1] == [Item("2 + 2?", "", "4")]
    with pytest.raises(ConfigError, match="no task named"):
        tasks.load(" , ")
    with pytest.raises(ConfigError, match=r"Unknown task 'mth'.*'math'"):
        tasks.load("mth")


@pytest.mark.parametrize(
    ("answers", "kind", "max_tokens"),
    [
        ([1, "2.5", "1,000"], "number", 256),
        (["A", "b"], "letter", 256),
        ([True, "false"], "true/false", 32),
        (["answer1", "answer5"], "answer", 32),
        (["option1", "option2"], "option", 32),
    ],
)
def test_the_kind_of_an_own_file_is_told_by_its_answers(
    tmp_path: Path, answers: list[Any], kind: str, max_tokens: int
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": "?", "answer": answer} for answer in answers]))
    task, items = tasks.load_file(file)
    assert (task.name, task.kind, task.max_tokens, len(items)) == ("mine", kind, max_tokens, len(answers))


def test_an_own_file_is_asked_with_its_fields(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"q": "How many?", "o": "(A) 1 (B) 2", "key": "b"}) + "\n")
    _, items = tasks.load_file(file, prompt="{q} Answer Choices: {o}", label="key")
    assert items == [Item("How many? Answer Choices: (A) 1 (B) 2", "", "B")]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "has no items"),
        (['{"question": "?", "answer": 1}', "{"], {}, ":2: is not JSON"),
        (['{"question": "?", "answer": 1}', "[1]"], {}, "line 2: must be an object"),
        (['{"question": "?", "answer": 1}', '{"question": "?"}'], {}, "line 2: field 'answer' is missing"),
        (['{"text": "?", "answer": 1}'], {}, "line 1: has no field instruction, question or prompt"),
        (['{"text": "?", "answer": 1}'], {"prompt": "{txt}"}, r"line 1: --prompt cannot be filled \('txt'\)"),
        (['{"question": 7, "answer": 1}'], {}, "line 1: field 'instruction' must be text"),
        (
            ['{"question": "?", "answer": 1}', '{"question": "?", "answer": "many"}'],
            {},
            "line 2: field 'answer': the answers must be all of one kind.* found 'many'",
        ),
    ],
)  # fmt: skip
def test_a_broken_own_file_is_named_with_line_and_field(
    tmp_path: Path, lines: list[str], options: dict[str, str], message: str
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message) as caught:
        tasks.load_file(file, **options)  # type: ignore[arg-type]
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "answer", "wanted"),
    [
        ("boolq", "maybe", "one of true/false"),
        ("piqa", "solution3", "one of solution1/solution2"),
        ("social_i_qa", "3", "one of answer1"),
        ("hellaswag", "ending0", "one of ending1"),
        ("winogrande", None, "one of option1/option2"),
        ("mathqa", "F", "a letter A-E"),
    ],
)
def test_a_wrong_label_is_named_for_every_kind(tmp_path: Path, name: str, answer: Any, wanted: str) -> None:
    write(tmp_path, name, [row(answer=answer)])
    with pytest.raises(DataError, match=f"item 0: field 'answer' must be {wanted}"):
        load_items(name, data_dir=tmp_path)


def test_hub_rows_of_another_schema_are_refused() -> None:
    with pytest.raises(DataError, match=r"openai/gsm8k: item 0: field 'question' is missing; found \['q'\]"):
        from_rows(find("gsm8k"), [{"q": "?"}])
    with pytest.raises(DataError, match="openai/gsm8k: item 0: not in the expected form"):
        from_rows(find("gsm8k"), [{"question": "?", "answer": "no marker"}])
    with pytest.raises(DataError, match="--data-dir"):
        load_items("AddSub")


def test_folder_items_keep_their_order_and_the_folder_its_case(tmp_path: Path) -> None:
    write(tmp_path, "svamp", [row(), row(instruction="2 + 2?", input="hint", answer=4)])
    assert load_items("SVAMP", data_dir=tmp_path) == [Item("1 + 1?", "", "2.0"), Item("2 + 2?", "hint", "4")]


def test_limit_is_a_repeatable_sample_in_order(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k", [row(instruction=str(index), answer=index) for index in range(100)])
    first = load_items("gsm8k", data_dir=tmp_path, limit=10, seed=3)
    labels = [int(item.label) for item in first]
    assert len(set(labels)) == 10
    assert labels == sorted(labels)
    assert labels != list(range(10))
    assert load_items("gsm8k", data_dir=tmp_path, limit=10, seed=3) == first
    assert load_items("gsm8k", data_dir=tmp_path, limit=10, seed=4) != first
    assert len(load_items("gsm8k", data_dir=tmp_path, limit=1000)) == 100
    with pytest.raises(ConfigError, match="limit is 0"):
        load_items("gsm8k", data_dir=tmp_path, limit=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"instruction": \n}]', r"test\.json:3: not valid JSON"),
        ([], "at least one item"),
        ({"a": 1}, "must be a JSON list"),
        ([row(), "text"], "item 1: must be an object .* found str"),
        ([row(), row(instruction=" ")], "item 1: field 'instruction'"),
        ([row(input=3)], "item 0: field 'input' must be text, found 3"),
        ([{"instruction": "?"}], "item 0: field 'answer' is missing"),
        ([row(answer="many")], "item 0: field 'answer' must be a number, found 'many'"),
        ([row(answer="nan")], "item 0: field 'answer' must be a number, found 'nan'"),
        ([row(answer=True)], "item 0: field 'answer' must be a number, found True"),
    ],
)
def test_a_broken_file_is_named_with_item_and_field(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_items("gsm8k", data_dir=write(tmp_path, "gsm8k", content))
    assert str(tmp_path / "gsm8k" / "test.json") in str(caught.value)


def test_a_letter_task_wants_letters(tmp_path: Path) -> None:
    write(tmp_path, "AQuA", [row(answer="b"), row(answer="F")])
    with pytest.raises(DataError, match="item 1: field 'answer' must be a letter A-E, found 'F'"):
        load_items("aqua", data_dir=tmp_path)


def test_missing_folders_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; --data-dir must hold gsm8k/test"):
        load_items("gsm8k", data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"mawps.test\.json: no such file"):
        load_items("mawps", data_dir=tmp_path)


@pytest.mark.parametrize(
    "name", ["gsm8k", "AQuA", "SVAMP", "MultiArith", "boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"]
)
def test_published_sets_load_whole(name: str) -> None:
    if not (SETS / name).is_dir():
        pytest.skip(f"{SETS / name} is not here: published test sets are not part of the project")
    task = find(name)
    assert len(load_items(task, data_dir=SETS)) == task.items


def test_generated_word_problems_need_no_files() -> None:
    items = load_items("wordproblems", limit=30, seed=1)
    assert len(items) == 30
    assert items == load_items("wordproblems", limit=30, seed=1)
    assert items != load_items("wordproblems", limit=30, seed=2)
    assert len(load_items("wordproblems")) == tasks.GENERATED_ITEMS


# Scoring -------------------------------------------------------------------------------------------------


class Tokenizer:
    """One id per character; the end token is 0."""

    bos_token, eos_token, eos_token_id, eos_token_ids = None, "\0", 0, frozenset({0})

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) % 256 for character in text] + [0]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class Scripted(nn.Module):
    """Says "4." whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Identity()]
        self.after = {  # last character -> next one
            10: ord("4"),
            ord("4"): ord("."),
            ord("."): 0,
        }

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        keys = mx.zeros((ids.shape[0], 1, ids.shape[1], 4))
        for layer in cache or []:
            layer.update_and_fetch(keys, keys)
        table = [self.after.get(index, 10) for index in range(256)]
        return mx.eye(256)[mx.array(table)[ids]]


def test_records_carry_answer_verdict_and_whether_the_item_was_seen() -> None:
    from mlx_adapters.data.overlap import item_hash, row_text
    from mlx_adapters.evaluate.ask import Asking, answer
    from mlx_adapters.evaluate.score import summarise

    items = [Item("2 + 2?", "", "4.0"), Item("2 + 3?", "", "5"), Item("1 + 3? Say how.", "", "4")]
    seen = frozenset({item_hash(row_text({"instruction": "2 + 3?", "input": ""}, "instruction"))})
    asking = Asking(template="alpaca", batch_size=2, max_tokens=8, seen=seen)
    records = list(answer(Scripted(), Tokenizer(), find("gsm8k"), items, asking))  # type: ignore[arg-type]
    by_index = {record.index: record for record in records}
    assert set(by_index) == {0, 1, 2}
    assert [by_index[i].correct for i in range(3)] == [True, False, True]
    assert [by_index[i].seen for i in range(3)] == [False, True, False]
    assert by_index[1].extracted == "4"
    assert by_index[1].response.strip() == "4."
    assert "2 + 3?" in by_index[1].prompt
    score = summarise(records)
    assert (score.correct, score.total, score.unanswered) == (2, 3, 0)
    assert (score.seen_total, score.seen_correct, score.unseen_total, score.unseen_correct) == (1, 0, 2, 2)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.low < score.accuracy < score.high


def test_wilson_interval_matches_published_values() -> None:
    from mlx_adapters.evaluate.score import wilson

    # R: binom::binom.wilson(c(0, 8, 20), c(10, 10, 20))
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_score_is_of_one_task() -> None:
    from mlx_adapters.evaluate.score import summarise

    with pytest.raises(DataError, match="one task"):
        summarise([])


def test_the_table_leaves_out_what_there_is_not_and_ends_in_the_mean() -> None:
    from mlx_adapters.evaluate.score import Record, summarise, table

    def record(task: str, right: bool, seen: bool = False) -> Record:
        return Record(
            task, 0, "", "", "", None, "", right, strict_correct=right, paper_correct=right, seen=seen
        )

    new = [summarise([record(task, right=True), record(task, right=task == "b")]) for task in ("a", "b")]
    heads, rows = table(new)
    assert heads == ["task", "accuracy", "95 % interval", "correct", "paper's rule"]
    assert rows[0][:2] == ["a", "50.0%"]
    assert rows[-1] == ["mean", "75.0%", "", "", ""]
    heads, rows = table([summarise([record("a", right=True, seen=True), record("a", right=False)])])
    assert heads[4:6] == ["seen in training", "unseen"]
    assert rows == [["a", "50.0%", rows[0][2], "1/2", "100.0% of 1", rows[0][5], "50.0%"]]
    assert rows[0][5].startswith("0.0% of 1 (")


def test_the_start_token_is_not_doubled_and_no_end_token_is_fed() -> None:
    from mlx_adapters.data.tokens import prompt_ids

    class Adds(Tokenizer):
        bos_token = "<s>"  # type: ignore[assignment]

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = [1] if add_special_tokens else []
            while text:
                ids.append(1 if text.startswith("<s>") else ord(text[0]))
                text = text[3:] if text.startswith("<s>") else text[1:]
            return [*ids, 0]

    assert prompt_ids("ab", Adds()) == [1, 97, 98]
    assert prompt_ids("<s>ab", Adds()) == [1, 97, 98]
