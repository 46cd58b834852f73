"""A study on a tiny model through the command: grid, resume, budget, failures, report."""

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command_line import cli
from study_files import study_file
from tiny import make_tiny

from mlx_adapters.errors import OutputError
from mlx_adapters.evaluate.score import wilson
from mlx_adapters.files.lock import locked
from mlx_adapters.study import cells, grid
from mlx_adapters.study.report import average, none_right
from mlx_adapters.study.run import study

COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app"]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in json.loads((folder / "results.json").read_text())["cells"]}


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(file, folder) of a finished study."""
    root = tmp_path_factory.mktemp("study")
    file = study_file(root, model)
    cli("study", file, "--output", root / "out")
    return file, root / "out"


def test_every_cell_is_trained_and_measured(done: tuple[Path, Path]) -> None:
    found = results(done[1])
    assert list(found) == [
        "base", "lora-attn-rank2", "lora-attn-rank4",
        "prefix-num_virtual_tokens2", "prefix-num_virtual_tokens3",
    ]  # fmt: skip
    # 2 layers x (q and o: 32 -> 32, k and v: 32 -> 16) at rank 2
    assert found["lora-attn-rank2"]["trainable"] == 2 * 2 * (2 * 64 + 2 * 48)
    assert {row["status"] for row in found.values()} == {"done"}
    assert {row["steps"] for name, row in found.items() if name != "base"} == {4}
    assert {row["scores"][0]["total"] for row in found.values()} == {4}


def test_the_report_holds_the_numbers_and_needs_nothing_else(done: tuple[Path, Path]) -> None:
    folder = done[1]
    page = (folder / "report.html").read_text()
    for row in results(folder).values():
        share = f"{row['average']['accuracy']:.1%}"
        count = f"{row['trainable']:,}" if "trainable" in row else ""
        for text in (page, (folder / "results.md").read_text()):
            lines = [line for line in re.split(r"<tr>|\n", text) if count in line and row["method"] in line]
            assert any(share in line for line in lines), row["id"]
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=(?!\"data:)|url\(|@import|https?://", page)
    assert "Tiny &lt;study&gt;" in page
    table = list(csv.reader((folder / "results.csv").open()))
    assert len(table) == 1 + 5
    assert len({len(line) for line in table}) == 1


def test_a_finished_study_is_not_done_again(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.CellRun, "phases", lambda _: pytest.fail("a finished cell was run again"))
    said = cli("study", done[0], "--output", done[1])
    assert "5 done before" in said.stderr


def test_a_changed_study_does_not_mix_with_the_old_one(done: tuple[Path, Path], model: Path) -> None:
    file = study_file(done[0].parent / "out", model, limit=3)
    (done[1] / "cells" / "base" / "cell.json").rename(done[1] / "kept")
    said = cli("study", file, "--output", done[1], code=2).stderr
    (done[1] / "kept").rename(done[1] / "cells" / "base" / "cell.json")
    assert "limit was 4, now 3" in said


def test_killed_studies_go_on(done: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    """SIGKILL in training and later; the result is that of the undisturbed study."""
    file, out = study_file(tmp_path, model), tmp_path / "out"
    command = [*COMMAND, "study", str(file), "--output", str(out)]
    waited = ("lora-attn-rank4/adapter/metrics.jsonl", "prefix-num_virtual_tokens3/trained.json")
    for name in waited:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        while not (out / "cells" / name).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    first = (out / "cells" / "base" / "cell.json").stat().st_mtime_ns
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "done before" in ended.stderr
    assert (out / "cells" / "base" / "cell.json").stat().st_mtime_ns == first
    whole, again = results(done[1]), results(out)
    assert {name: row["scores"] for name, row in again.items()} == {
        name: row["scores"] for name, row in whole.items()
    }


def test_a_cell_that_fails_stops_no_other(model: Path, tmp_path: Path) -> None:
    entries = [
        {"method": "lora", "set": {"targets": "nowhere"}, "size": {"rank": [2]}},
        {"method": "lora", "size": {"rank": [4]}},
    ]
    file = study_file(tmp_path, model, grid=entries, base=False)
    said = cli("study", file, "--output", tmp_path / "out", code=1)
    assert "failed: lora-rank2" in said.stderr
    found = results(tmp_path / "out")
    assert "nowhere" in found["lora-rank2"]["error"]
    assert found["lora-rank4"]["status"] == "done"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Failed cells" in page
    assert "nowhere" in page


def test_the_budget_cuts_steps_and_items(model: Path, tmp_path: Path) -> None:
    file = study_file(tmp_path, model, base=False, grid=[{"method": "ia3"}])
    cli("study", file, "--output", tmp_path / "out", "--max-steps", 1, "--limit", 2)
    (row,) = results(tmp_path / "out").values()
    assert (row["steps"], row["scores"][0]["total"]) == (1, 2)


@pytest.mark.slow
def test_two_at_once_find_the_same(done: tuple[Path, Path], tmp_path: Path) -> None:
    command = [*COMMAND, "study", str(done[0]), "--output", str(tmp_path / "out"), "--jobs", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "the free memory is enough for" in ended.stderr
    whole, again = results(done[1]), results(tmp_path / "out")
    assert {n: r["scores"] for n, r in again.items()} == {n: r["scores"] for n, r in whole.items()}


def test_a_folder_belongs_to_one_study(done: tuple[Path, Path]) -> None:
    with locked(done[1]):
        assert "another run is writing there" in cli("study", done[0], "--output", done[1], code=2).stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": [{"method": "lroa"}]}, "grid entry 1: key 'method': Unknown method 'lroa'. Did you mean"),
        ({"grid": [{"method": "lora", "size": {"rnk": [1]}}]}, "field of lora 'rnk'. Did you mean 'rank'"),
        ({"grid": [{"method": "lora", "size": {"rank": ["x"]}}]}, "rank='x' is not a whole number"),
        ({"grid": [{"method": "lora", "sise": {}}]}, "Unknown key 'sise'. Did you mean 'size'"),
        ({"grid": [{"method": "lora"}, {"method": "lora"}]}, "the cell lora is there already"),
        ({"grid": {}}, "key 'grid' must be a list"),
        ({"train": {"stepz": 3}}, "'stepz'. Did you mean 'steps'"),
        ({"decoding": "bream"}, "Unknown decoding 'bream'"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"sedes": [1]}, "Unknown key 'sedes'. Did you mean 'seeds'"),
        (
            {"grid": [{"method": "lora", "set": {"alpha": "2*rnk"}}]},
            "field of lora 'rnk'. Did you mean 'rank'",
        ),
        (
            {"grid": [{"method": "lora", "set": {"alpha": "2*targets"}}]},
            "alpha='2*targets' needs targets to be a number, found 'default'",
        ),
        (
            {"grid": [{"method": "lora", "set": {"alpha": "2*alpha"}}]},
            "alpha='2*alpha' needs alpha to be a number, found '2*alpha'",
        ),
        ({"grid": [{"method": "lora", "set": {"alpha": "rank+2"}}]}, "alpha='rank+2' is not a number"),
        ({"grid": [{"method": "lora", "set": {"rank": "0.3*alpha"}}]}, "rank=4.8 is not a whole number"),
        ({"protocol": "papr"}, "Unknown protocol 'papr'. Did you mean 'paper'"),
        ({"protocol": "paper"}, "max_tokens 4 contradicts protocol paper, which uses each set's own limit"),
        (
            {"protocol": "paper", "max_tokens": None, "decoding": "greedy"},
            "decoding greedy contradicts protocol",
        ),
        (
            {"protocol": "paper", "max_tokens": None, "train": {"template": "chat"}},
            "template chat contradicts protocol paper, which uses llm-adapters",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    changes: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    file = study_file(tmp_path, model, **changes)
    said = cli("study", file, "--output", tmp_path / "out", code=2).stderr
    assert words in said
    assert str(file) in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_study_of_an_earlier_version_goes_on(model: Path, tmp_path: Path) -> None:
    """Its cells' settings had `cutoff`, and 0 rows of validation; the file says nothing of either."""
    read = grid.read({"model": str(model), "train": {"steps": 4}, "grid": [{"method": "lora"}]})
    (cell,) = read.cells
    assert cell.train.max_length == 256, "a study's cells have one length, whatever the rows"
    settings = json.loads(json.dumps({"study": read.common(), "cell": asdict(cell)}))
    train = settings["cell"]["train"]
    train |= {"cutoff": train.pop("max_length"), "validation": 0}
    for name in ("long_rows", "weights"):
        del train[name]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    now = {"study": read.common(), "cell": asdict(cell)}
    cells._same_settings(tmp_path, now)
    train["cutoff"] = 128
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(OutputError, match="made with other settings"):
        cells._same_settings(tmp_path, now)
    again = {"model": str(model), "train": {"cutoff": 48}, "grid": [{"method": "lora"}]}
    assert grid.read(again).cells[0].train.max_length == 48


def test_the_examples_have_the_paper_s_parameter_counts() -> None:
    """LLaMA-7B without its weights; the four counts are those of the seed's runs."""
    placement = cells.parameters(grid.read(EXAMPLES / "study-placement.yaml"))
    sizes = cells.parameters(grid.read(EXAMPLES / "study-size.yaml"))
    assert placement["series-attn+mlp"] == 201_326_592
    assert placement["parallel-attn"] == 201_326_592
    assert sizes["lora-attn+mlp-rank32"] == 56_098_816
    assert sizes["series-mlp-bottleneck_size256"] == 67_108_864
    assert sizes["parallel-mlp-bottleneck_size256"] == 247_463_936
    assert sizes["prefix-num_virtual_tokens10"] == 2_621_440
    said = cli("study", EXAMPLES / "study-size.yaml", "--dry-run").stdout
    assert "56,098,816" in said
    assert "16 cells" in said


def test_the_small_study_is_a_study() -> None:
    assert len(grid.read(EXAMPLES / "study-cpu.yaml").cells) == 8


def shares(*counts: tuple[int, int]) -> list[dict[str, Any]]:
    """The scores of sets with so many right of so many."""
    return [
        {"correct": right, "total": total, "accuracy": right / total}
        | dict(zip(("low", "high"), wilson(right, total), strict=True))
        for right, total in counts
    ]


def test_the_average_weighs_sets_alike_and_one_set_keeps_its_interval() -> None:
    (one,) = shares((7, 20))
    assert average([one]) == {name: one[name] for name in ("accuracy", "low", "high")}
    assert average(shares((10, 20), (70, 100)))["accuracy"] == pytest.approx(0.6)


def test_the_average_s_interval_is_that_of_statpsych() -> None:
    """R's statpsych documents ci.lc.prop.bs for 26 and 24 of 60: difference 0.03225806, error 0.08857951.

    The average of 26 of 60 and of the other 36 of 60 is (1 + difference) / 2.
    """
    found = average(shares((26, 60), (36, 60)))
    for name, z in (("low", -1.959964), ("high", 1.959964)):
        assert found[name] == pytest.approx((1 + 0.03225806 + z * 0.08857951) / 2, abs=1e-8)


def test_an_average_of_nothing_right_is_no_certainty() -> None:
    nothing, everything = average(shares((0, 20), (0, 20))), average(shares((20, 20), (20, 20)))
    assert nothing["low"] == 0
    assert 0.05 < nothing["high"] < wilson(0, 20)[1]
    assert (everything["low"], everything["high"]) == (pytest.approx(1 - nothing["high"]), 1)


@pytest.mark.parametrize("truth", [(0.02, 0.02), (0.05, 0.4), (0.5, 0.5), (0.97, 0.8), (0.1, 0.1, 0.9)])
def test_the_average_s_interval_holds_the_truth_as_often_as_it_says(truth: tuple[float, ...]) -> None:
    """Every outcome of 20 items a set, with its probability: no drawing, no tolerance for luck."""
    total, mean, covered = 20, sum(truth) / len(truth), 0.0
    chances = [[math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(total + 1)] for p in truth]
    for counts in itertools.product(range(total + 1), repeat=len(truth)):
        found = average(shares(*((count, total) for count in counts)))
        if found["low"] <= mean <= found["high"]:
            covered += math.prod(chance[count] for chance, count in zip(chances, counts, strict=True))
    assert 0.93 < covered < 0.995


def test_a_field_may_be_a_multiple_of_another(model: Path, tmp_path: Path) -> None:
    entry = {"method": "lora", "set": {"alpha": "2*rank"}, "size": {"rank": [4, 32]}}
    default = {"method": "lora", "placement": {"default": {}}, "set": {"alpha": " 0.5 * rank "}}
    named = {"method": "lora", "placement": {"none": {"rank": 6}}, "size": {"alpha": ["1*rank", "2*rank"]}}
    found = grid.read(study_file(tmp_path, model, grid=[entry, default, named])).cells
    assert [(one.fields["rank"], one.fields["alpha"]) for one in found] == [
        (4, 8), (32, 64), (8, 4), (6, 6), (6, 12),
    ]  # fmt: skip
    assert [one.id for one in found[:2]] == ["lora-rank4", "lora-rank32"]
    assert len({one.id for one in found}) == 5


def test_the_examples_hold_the_scale_of_every_rank() -> None:
    for name in ("study-size", "study-cpu", "study-placement"):
        cells = [one for one in grid.read(EXAMPLES / f"{name}.yaml").cells if one.method == "lora"]
        assert {one.fields["alpha"] / one.fields["rank"] for one in cells} == {2.0}, name


def test_the_papers_protocol_is_one_key(model: Path, tmp_path: Path) -> None:
    study = grid.read(study_file(tmp_path, model, max_tokens=None, protocol="paper"))
    assert (study.settings.decoding, study.settings.reading) == ("beam", "paper")
    assert {one.train.template for one in study.cells} == {"llm-adapters"}
    for name in ("study-placement", "study-size"):
        assert grid.read(EXAMPLES / f"{name}.yaml").settings.reading == "paper"


def test_cells_read_by_other_rules_are_not_put_into_one_table(done: tuple[Path, Path]) -> None:
    """As a study of an earlier version is: its answers were read otherwise."""
    file = done[1] / "cells" / "base" / "cell.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"reading": "strict 1"}))
    said = cli("study", done[0], "--output", done[1], code=2).stderr
    file.write_text(before)
    assert f"{file}: its answers were read by other rules (strict 1; now strict 3)" in said
    assert "Remove" in said


def test_sets_with_nothing_right_are_named_under_the_table(done: tuple[Path, Path]) -> None:
    score = {"task": "SVAMP", "correct": 0, "total": 4, "unanswered": 1, **shares((0, 4))[0]}
    rows = [
        {"id": "base", "scores": [score | {"unanswered": 4}]},
        {"id": "lora", "scores": [score | {"task": "gsm8k", "correct": 2}, score]},
    ]
    (line,) = none_right(rows)
    assert line.startswith("SVAMP: no answer is right in base, lora; in base no answer could be read. Look")
    folder = done[1]
    for line in none_right(list(results(folder).values())):
        assert line in cli("study", done[0], "--output", folder).stdout
        assert line in (folder / "results.md").read_text()


def test_a_study_from_python_yields_its_cells(model: Path, tmp_path: Path) -> None:
    settings = json.loads(study_file(tmp_path, model, grid=[{"method": "ia3"}]).read_text())
    out = tmp_path / "out"
    assert [(cell["id"], cell["status"]) for cell in study(settings, str(out))] == [
        ("base", "done"), ("ia3", "done"),
    ]  # fmt: skip
    assert set(results(out)) == {"base", "ia3"}
    assert list(study(tmp_path / "study.yaml", out)) == [], "nothing is done twice"
