"""An evaluation from Python: the report of the command, for objects, folders and names alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny
from trained import make_adapter
from typer.testing import CliRunner

from mlx_adapters.adapter import multi
from mlx_adapters.cli.app import app
from mlx_adapters.errors import AdapterError, ConfigError, OutputError
from mlx_adapters.evaluate.compare import compare
from mlx_adapters.evaluate.config import EvalConfig
from mlx_adapters.evaluate.run import Evaluator, evaluate
from mlx_adapters.models.load import load


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    model = make_tiny("llama", root).rename(root / "model")
    make_adapter(model, root / "lora", "lora", {"rank": 4}, seed=3)
    items = [{"question": f"tom has w{n} apples", "answer": str(n)} for n in range(6)]
    (root / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return root


def report(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample"])
def test_the_report_is_that_of_the_command(decoding: str, root: Path, tmp_path: Path) -> None:
    model, tasks, adapter = root / "model", root / "test.jsonl", root / "lora"
    command = [
        "eval",
        model,
        "--task",
        tasks,
        "--adapter",
        adapter,
        "--max-tokens",
        6,
        "--decoding",
        decoding,
    ]
    done = CliRunner().invoke(app, [*map(str, command), "--output", str(tmp_path / "cli.json")])
    assert done.exit_code == 0, done.output
    options: dict[str, Any] = {"max_tokens": 6, "decoding": decoding}
    found = evaluate(str(model), str(tasks), adapter=str(adapter), **options)
    found.save(tmp_path / "python.json")
    assert report(tmp_path / "python.json") == report(tmp_path / "cli.json")
    assert found.accuracy == sum(record.correct for record in found.records) / 6
    loaded = load(model, answering=True)
    again = evaluate(loaded, tasks, adapter=adapter, output=tmp_path / "loaded.json", **options)
    assert (again.records, again.scores) == (found.records, found.scores)
    assert report(tmp_path / "loaded.json")["records"] == report(tmp_path / "cli.json")["records"]
    assert multi.names(loaded.model) == []
    with pytest.raises(OutputError, match="exists"):
        found.save(tmp_path / "python.json")


def test_records_come_one_by_one_and_the_rest_at_the_end(root: Path) -> None:
    with Evaluator(root / "model", root / "test.jsonl", EvalConfig(max_tokens=2)) as evaluator:
        (part,) = evaluator.parts
        first = next(iter(part))
        assert (part.left, list(part.done)) == (5, [first.index])
        found = evaluator.finish()
    assert [record.index for record in found.records] == list(range(6))


def test_evaluations_files_and_records_are_compared_alike(root: Path, tmp_path: Path) -> None:
    base, adapted = (evaluate(root / "model", root / "test.jsonl", adapter=a, max_tokens=4)
                     for a in (None, root / "lora"))  # fmt: skip
    base.save(tmp_path / "base.json")
    expected = compare(base.records, adapted.records)
    assert (
        compare(tmp_path / "base.json", adapted) == compare(str(tmp_path / "base.json"), adapted) == expected
    )
    assert expected[0].total == 6


def test_mistakes_are_raised_before_the_model_loads(root: Path) -> None:
    nowhere = root / "nowhere"
    with pytest.raises(ConfigError, match="Unknown field of evaluate 'sede'"):
        evaluate(nowhere, root / "test.jsonl", sede=3)
    with pytest.raises(ConfigError, match="Unknown decoding 'gredy'"):
        evaluate(nowhere, root / "test.jsonl", decoding="gredy")
    with pytest.raises(AdapterError):
        evaluate(nowhere, root / "test.jsonl", adapter=root / "no-adapter")
    with pytest.raises(ConfigError, match="processes load the model themselves"):
        evaluate(load(root / "model"), root / "test.jsonl", processes=2)
