"""Which rows the loss is measured on: held out, a file, a part of the data by its name, a folder's own."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from small_run import jsonl

from mlx_adapters.errors import DataError
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.examples import prepare, rows_of
from mlx_adapters.train.validation import Parts, parts_of

ROWS = [{"prompt": f"tom has {n // 10} {n % 10} apples", "completion": "the answer"} for n in range(30)]
OTHER = [{"prompt": f"{n} more", "completion": "?"} for n in range(5)]


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> model.LanguageModel:
    return model.load(folders["llama"])


def parts(loaded: model.LanguageModel, data: Any, **options: Any) -> Parts:
    config, written = TrainConfig(**options), datetime(2026, 1, 1)
    rows = rows_of(data, config.columns)
    how: Any = {"template": "plain", "written": written}
    prepared = prepare(rows, loaded, config, **how)
    examples, seen = prepared.encoded.examples, prepared.facts.seen
    return parts_of(rows, examples, loaded, config, seen=seen, **how)


def texts(loaded: model.LanguageModel, found: Parts) -> list[str]:
    return [loaded.tokenizer.decode(example.ids, skip_special_tokens=True) for example in found.validation]


@pytest.mark.parametrize(("wanted", "count"), [(3, 3), ("3", 3), (0.1, 3), ("0.1", 3), (0.001, 1), (0, 0)])
def test_rows_are_held_out_by_number_or_fraction(
    wanted: Any, count: int, loaded: model.LanguageModel
) -> None:
    found = parts(loaded, ROWS, validation=wanted)
    assert (len(found.training), len(found.validation)) == (30 - count, count)
    assert (found.words or "").startswith(f"validation on {count} row" if count else "")
    assert found.notes == ()
    assert not {tuple(e.ids) for e in found.training} & {tuple(e.ids) for e in found.validation}
    assert found.validation == parts(loaded, ROWS, validation=count).validation


def test_equal_rows_on_both_sides_are_counted(loaded: model.LanguageModel) -> None:
    found = parts(loaded, [*ROWS, *ROWS], validation=0.5)
    everything = {tuple(example.ids) for example in found.training}
    both = sum(tuple(example.ids) in everything for example in found.validation)
    assert 0 < both < 30
    assert found.notes[0].startswith(f"validation rows also among the training rows: {both} of 30. On")


def test_a_file_is_measured_on_like_the_training_rows(loaded: model.LanguageModel, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "mine.jsonl", [*OTHER, ROWS[0]])
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    found = parts(loaded, data, validation=str(file), max_length=6)
    assert len(found.training) == 30
    assert found.words == f"validation on 6 rows of {file}, 1 cut at 6 tokens"
    assert found.notes == (
        "validation rows with the question of a training row: 1 of 6. On these the loss tells what was "
        "learned by heart",
    )
    assert max(len(example.ids) for example in found.validation) == 6
    assert found.validation[0].loss_start == found.training[0].loss_start - 3
    columns = jsonl(tmp_path / "columns.jsonl", [{"q": r["prompt"], "a": r["completion"]} for r in ROWS])
    named = parts(loaded, columns, validation=str(columns), columns="prompt=q,completion=a")
    assert named.validation == named.training
    some = parts(loaded, data, validation=str(data), validation_limit=4)
    assert some.words == f"validation on 4 rows of {data}, drawn by the seed from 30"
    assert texts(loaded, some) == texts(loaded, parts(loaded, data, validation=str(data), validation_limit=4))


@pytest.mark.parametrize("name", ["valid.jsonl", "validation.json", "val.jsonl.gz", "dev.csv"])
def test_a_folder_brings_its_own(name: str, loaded: model.LanguageModel, tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "test.jsonl", ROWS[:2])
    file = tmp_path / name
    if name.endswith(".gz"):
        import gzip

        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in OTHER).encode()))
    elif name.endswith(".csv"):
        file.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in OTHER))
    else:
        file.write_text(json.dumps(OTHER) if name.endswith(".json") else "\n".join(map(json.dumps, OTHER)))
    for wanted in (None, file.name.partition(".")[0], str(tmp_path)):
        found = parts(loaded, tmp_path, validation=wanted)
        assert found.words == f"validation on 5 rows of {file}"
        assert texts(loaded, found) == [f"{n} more ?" for n in range(5)]
    assert len(parts(loaded, tmp_path, validation=0).validation) == 0
    assert (
        parts(loaded, tmp_path, validation="test").words == f"validation on 2 rows of {tmp_path}/test.jsonl"
    )
    beside = parts(loaded, tmp_path / "train.jsonl")
    assert beside.notes == (f"{file} is not used: --validation {file} measures on it",)
    assert (beside.words, len(beside.validation)) == (None, 0)


def test_a_long_file_that_nobody_named_is_sampled(loaded: model.LanguageModel, tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    many = [{"prompt": f"{a} {b} more", "completion": "?"} for a in range(10) for b in range(30)]
    file = jsonl(tmp_path / "valid.jsonl", many)
    assert parts(loaded, tmp_path).words == f"validation on 200 rows of {file}, drawn by the seed from 300"
    assert len(parts(loaded, tmp_path, validation="valid").validation) == 300
    assert len(parts(loaded, tmp_path, validation_limit=250).validation) == 250


def test_several_folders_bring_theirs(loaded: model.LanguageModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        jsonl(tmp_path / name / "train.jsonl", ROWS)
        jsonl(tmp_path / name / "valid.jsonl", OTHER)
    found = parts(loaded, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(found.validation) == 10
    assert (
        found.words
        == f"validation on 5 rows of {tmp_path}/a/valid.jsonl and 5 rows of {tmp_path}/b/valid.jsonl"
    )


def test_a_saved_dataset_has_parts(loaded: model.LanguageModel, tmp_path: Path) -> None:
    import datasets

    made = {"train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(OTHER)}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    for wanted in (None, "dev"):
        found = parts(loaded, tmp_path / "saved", validation=wanted)
        assert (len(found.training), len(found.validation)) == (30, 5)


def test_a_part_of_a_hub_set(loaded: model.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, *, split: str, revision: str | None, **more: Any) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS if split == "train" else OTHER)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = parts(loaded, "owner/name:main/train@v1", validation="dev")
    assert len(found.validation) == 5
    parts(loaded, ROWS, validation="owner/other")
    parts(loaded, ROWS, validation="owner/other/test")
    assert asked == [
        ("owner/name", "main", "train", "v1"),
        ("owner/name", "main", "dev", "v1"),
        ("owner/other", None, "validation", None),
        ("owner/other", None, "test", None),
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (30, "validation=30 leaves nothing of 30 rows"),
        ("dev", r"validation=dev: is no file, and no part of .*rows.jsonl.*a fraction \(0.05\)"),
        ("none.jsonl", r"none.jsonl: no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(
    wanted: Any, message: str, loaded: model.LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        parts(loaded, jsonl(tmp_path / "rows.jsonl", ROWS), validation=wanted)
