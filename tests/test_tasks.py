"""Test sets from a folder, the hub's schemas and the generator; scoring them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_adapters.errors import ConfigError, DataError
from mlx_adapters.evaluate import tasks
from mlx_adapters.evaluate.tasks import Item, find, from_rows, load_items

SETS = Path(__file__).parents[2] / "shared" / "data" / "test"


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
                "options": ["A)21 km", "B) 2(3)", "C)x"],
                "rationale": "",
                "correct": "B",
            },
            Item("How far? Answer Choices: (A) 21 km (B) 2(3) (C) x", "", "B"),
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
        ("MultiArith", {"question": " How many? ", "final_ans": "15"}, Item("How many?", "", "15")),
    ],
)
def test_hub_rows_become_the_same_questions(name: str, rows: dict[str, Any], expected: Item) -> None:
    assert from_rows(find(name), [rows]) == [expected]


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


@pytest.mark.parametrize("name", ["gsm8k", "AQuA", "SVAMP", "MultiArith"])
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
    from mlx_adapters.evaluate.score import evaluate, summarise

    items = [Item("2 + 2?", "", "4.0"), Item("2 + 3?", "", "5"), Item("1 + 3? Say how.", "", "4")]
    seen = frozenset({item_hash(row_text({"instruction": "2 + 3?", "input": ""}, "instruction"))})
    records = list(
        evaluate(
            Scripted(), Tokenizer(), items, "gsm8k", template="alpaca", batch_size=2, max_tokens=8, seen=seen
        )
    )
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


def test_the_start_token_is_not_doubled_and_no_end_token_is_fed() -> None:
    from mlx_adapters.evaluate.score import prompt_ids

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
