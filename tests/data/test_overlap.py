"""Which test items stood in the training data: told by hashes, from files and from an adapter's folder."""

import json
import random
from pathlib import Path

import pytest
from command_line import cli
from tiny import make_tiny

from mlx_adapters.data import overlap as module
from mlx_adapters.data.overlap import gram_hashes, item_hash, overlap, questions, rows_texts, seen_hashes
from mlx_adapters.data.sources import load_rows
from mlx_adapters.errors import DataError
from mlx_adapters.train.examples import excluded_hashes

DATA = Path(__file__).parents[3] / "shared" / "data"
WORDS = [f"word{number}" for number in range(500)]


def text(seed: int, count: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def rows(file: Path, texts: list[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps([{"instruction": t, "input": "", "output": "7", "answer": "7"} for t in texts])
    )
    return file


def test_seen_near_and_new_items_are_told_apart() -> None:
    known = seen_hashes([text(1), text(2), "short one"])
    changed = text(1).split()
    tests = [
        text(1).upper() + "!",  # the same letters
        " ".join(["quite", "new", *changed[5:18], "end"]),  # 13 words of it
        " ".join(["quite", "new", *changed[5:17], "end"]),  # only 12
        text(3),
        "Short One?",
        "another short one",
    ]
    found = overlap(known, tests)
    assert (found.seen, found.near, found.total, found.sampled) == ([0, 4], [1], 6, False)
    assert questions(known) == 3


def test_hashes_tell_nothing_else() -> None:
    known = seen_hashes([text(1)])
    assert known == sorted(known)
    assert item_hash(text(1)) in known
    assert len(known) == 1 + (30 - 12)
    assert {len(entry) for entry in known} == {16}
    assert gram_hashes(text(1)) == {entry for entry in known if entry.startswith("g")}
    assert overlap([], [text(1)]).seen == []


def test_phrases_of_a_task_are_no_overlap() -> None:
    phrase = text(0, 15)
    many = seen_hashes([f"{phrase} {text(number, 3)}" for number in range(1, 20)])
    few = seen_hashes([f"{phrase} {text(number, 3)}" for number in range(1, 5)])
    item = f"{phrase} {text(99, 3)}"
    assert overlap(many, [item]).near == []
    assert overlap(few, [item]).near == [0]


def test_the_papers_phrases_are_no_overlap() -> None:
    ask = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    form = "\n\nOption1: box Option2: bag Answer format: option1/option2"
    known = seen_hashes([f"{ask}The box was big.{form}"])
    assert overlap(known, [f"{ask}A cat was here.{form}"]).near == []


def test_a_large_set_is_remembered_by_a_sample_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seen_hashes([text(number) for number in range(50)])
    monkeypatch.setattr(module, "KEPT", 200)
    known = seen_hashes([text(number) for number in range(50)])
    assert len(known) == 250
    assert set(known) < set(whole)
    found = overlap(known, [text(number) + " more" for number in range(50)] + [text(3)])
    assert found.sampled
    assert found.seen == [50]
    assert 40 < len(found.near) <= 50  # four of an item's 18 hashes are kept on average


def test_the_command_counts_files_and_sets(tmp_path: Path) -> None:
    train = rows(tmp_path / "train.json", [text(1), text(2)])
    rows(tmp_path / "sets" / "gsm8k" / "test.json", [text(1), text(2) + " more", text(3)])
    other = rows(tmp_path / "other.json", [text(4)])
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": text(2), "completion": ""}) + "\n")
    test = f"gsm8k,{other},{plain}"
    found = json.loads(cli("data", "overlap", train, test, "--data-dir", tmp_path / "sets", "--json").stdout)
    assert [(one["total"], one["seen"], one["near"]) for one in found] == [
        (3, [0], [1]),
        (1, [], []),
        (1, [0], []),
    ]
    shown = cli("data", "overlap", train, test, "--data-dir", tmp_path / "sets", "--show", 1).stdout
    assert "gsm8k item 0, seen: word" in shown
    assert "gsm8k item 1, near: word" in shown


def test_an_adapter_is_compared_by_what_it_remembers(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path)
    story = "tom has 3 apples and buys 4 more from the market on the hill today"
    data = rows(tmp_path / "train.json", ["tom has 3 apples", "tom buys 4 more", f"{story} how many now"])
    cli("train", model, "--data", data, "--output", tmp_path / "a", "--steps", 1, "--set", "rank=2")
    test = rows(tmp_path / "test.json", ["Tom has 3 apples?", "how many ?", f"{story} how many were bought"])
    (found,) = json.loads(cli("data", "overlap", tmp_path / "a", test, "--json").stdout)
    assert (found["seen"], found["near"], found["total"]) == ([0], [2], 3)
    assert "3 training questions" in cli("info", tmp_path / "a").output
    (tmp_path / "a" / "seen.txt").unlink()
    said = cli("data", "overlap", tmp_path / "a", test, code=2)
    assert "does not remember what it was trained on" in said.output


# counted apart from this code (evaluation.md, "Leakage is real here"): the sets kept beside the repository
SEEN = {"gsm8k": (1055, 1319), "AQuA": (203, 254), "SVAMP": (800, 1000), "MultiArith": (491, 600)}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the study's data in {DATA}")
def test_the_leak_of_the_study_is_reported() -> None:
    train, sets = DATA / "train" / "math_data.json", DATA / "test"
    result = cli("data", "overlap", train, ",".join(SEEN), "--data-dir", sets, "--json")
    found = {one["test"]: (len(one["seen"]), one["total"]) for one in json.loads(result.stdout)}
    assert found == SEEN


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the study's data in {DATA}")
def test_eval_reports_the_leak_of_an_adapter_trained_on_it(tmp_path: Path) -> None:
    model, train = make_tiny("llama", tmp_path), DATA / "train" / "math_data.json"
    cli("train", model, "--data", train, "--output", tmp_path / "a", "--steps", 1, "--set", "rank=2")
    run = ["eval", model, "--adapter", tmp_path / "a", "--task", "SVAMP", "--data-dir", DATA / "test"]
    (score,) = json.loads(cli(*run, "--max-tokens", 1, "--batch-size", 64, "--json").stdout)["scores"]
    assert (score["seen_total"], score["total"]) == (800, 1000)
    assert score["near_total"] > 50, "SVAMP asks several questions about one story"
    assert score["seen_total"] + score["near_total"] + score["unseen_total"] == 1000


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the study's data in {DATA}")
def test_what_is_remembered_of_the_study_stays_small_and_finds_variants() -> None:
    known = seen_hashes(rows_texts(load_rows(str(DATA / "train" / "math_data.json"))))
    assert sum(len(entry) + 1 for entry in known) < 2e6
    items = json.loads((DATA / "test" / "SVAMP" / "test.json").read_text())
    found = overlap(known, [item["instruction"] for item in items])
    assert len(found.seen) == 800
    assert len(found.near) > 50  # SVAMP asks several questions about one story
    for index in found.near[:5]:
        assert not gram_hashes(items[index]["instruction"]).isdisjoint(known)


def test_rows_are_excluded_by_test_files_of_every_form(tmp_path: Path) -> None:
    """A test set in a form that only `eval` knows excludes as well as one in a form of training data."""
    training = rows(tmp_path / "d.json", [text(1), text(2), text(3)])
    trained, asked = tmp_path / "trained.jsonl", tmp_path / "asked.jsonl"
    trained.write_text(json.dumps({"prompt": text(1), "completion": "free", "answer": "free"}) + "\n")
    asked.write_text(json.dumps({"question": text(2), "answer": "7"}) + "\n")
    left = excluded_hashes([trained, asked])
    assert [item_hash(one) in left for one in rows_texts(load_rows(str(training)))] == [True, True, False]
    asked.write_text("[3]")
    with pytest.raises(DataError, match=r"asked.jsonl"):
        excluded_hashes([asked])
