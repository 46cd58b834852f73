"""`--json`: every command prints one document with the fields its help names, and the figures people read."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import cli, commands
from tiny import make_tiny
from trained import make_adapter
from typer.testing import CliRunner, Result

from mlx_adapters.cli.app import app
from mlx_adapters.cli.report import report
from mlx_adapters.units import size

# They talk until they are stopped: what they say is no report.
WITHOUT = {"chat", "serve"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two adapters of it, data, a test set, two evaluations and a study."""
    root = tmp_path_factory.mktemp("json")
    model = make_tiny("llama", root).rename(root / "model")
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(model, root / name, "lora", {"rank": 4}, seed=seed)
    rows = [{"instruction": f"Tom has w{n} apples", "output": "the answer is 7 ."} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [*(row["instruction"] for row in rows[:2]), "Tom has 9 books"]
    items = [{"instruction": text, "input": "", "output": "", "answer": "7"} for text in questions]
    (root / "sets" / "SVAMP").mkdir(parents=True)
    (root / "sets" / "SVAMP" / "test.json").write_text(json.dumps(items))
    for name in ("one", "two"):
        letters = {"one": "rrrrwwww", "two": "rwwwwwww"}[name]
        empty = {"prompt": "", "response": "", "extracted": "", "label": "7"}
        records = [
            {"task": "SVAMP", "index": i, "item": str(i), "correct": letter == "r", **empty}
            for i, letter in enumerate(letters)
        ]
        (root / f"{name}.json").write_text(json.dumps({"records": records}))
    study = {
        "name": "tiny", "model": str(model), "rows": 8, "limit": 2, "max_tokens": 2,
        "train": {"steps": 1, "batch_size": 2, "max_length": 48, "warmup": 0},
        "grid": [{"method": "lora", "size": {"rank": [2]}}],
    }  # fmt: skip
    (root / "study.yaml").write_text(json.dumps(study))
    return root


@dataclass(frozen=True)
class Case:
    """Arguments, where OUT is a new folder and other capitals files of `root`; and the figures that stand in
    what people read, told from the document."""

    arguments: str
    figures: Callable[[Any], list[str]]
    code: int = 0


def _scores(found: Any) -> list[str]:
    (one,) = found["scores"]
    shares = (f"{one[key]:.1%}" for key in ("accuracy", "low", "high"))
    return [*shares, f"{one['correct']}/{one['total']}"]


def _verdict(found: Any) -> list[str]:
    return [f"{found['verify']['bound']:.1e}", {True: "passed", False: "FAILED"}[found["verify"]["passed"]]]


CASES = {
    "quickstart": Case(
        "--model MODEL --dir OUT --steps 1",
        lambda d: [
            f"{d['base']['correct']}/100",
            f"{d['adapted']['correct']}/100",
            f"{d['trainable']:,}",
            f"{d['gain']:+.1f} points",
            size(d["bytes"]),
            f"{d['bits_per_weight']:.2f} bits",
            "Not verified" if d["verify"] is None else "Verified in PyTorch: passed",
        ],
    ),
    "convert": Case(
        "MODEL OUT --bits 8 --group-size 32 --verify",
        lambda d: [
            size(d["bytes"]),
            f"{d['parameters'] / 1e6:.1f} M",
            f"{d['bits_per_weight']:.2f} bits",
            f"{d['verify']['argmax_agreement']:.1%}",
            *_verdict(d),
        ],
    ),
    "plan": Case(
        "MODEL --batch-sizes 1 --tokens 16 --memory 1GB",
        lambda d: [size(d["memory"]), size(d["plans"][0]["weights"]), size(d["plans"][0]["adapter"])],
    ),
    "train": Case(
        "MODEL --data DATA.jsonl --output OUT --steps 2 --validation 2",
        lambda d: [f"trained {d['steps']} steps", f"loss {d['loss']:.4f} at step {d['step']}"],
    ),
    "eval": Case("MODEL --adapter A --task SVAMP --data-dir SETS --max-tokens 2", _scores),
    "compare": Case(
        "ONE.json TWO.json",
        lambda d: [
            f"one {d[0]['a_correct'] / d[0]['total']:.1%}, two {d[0]['b_correct'] / d[0]['total']:.1%}",
            f"one alone is right on {d[0]['only_a']}, two alone on {d[0]['only_b']}",
            f"{d[0]['low']:+.1%} to {d[0]['high']:+.1%}",
            f"p = {d[0]['p']:.2g}",
        ],
    ),
    "study": Case(
        "STUDY.yaml --output OUT",
        lambda d: [f"{len(d['cells'])} cells", f"{d['cells'][1]['trainable']:,}"]
        + [f"{score['accuracy']:.1%}" for row in d["cells"] for score in row["scores"]],
    ),
    "export": Case(
        "A OUT --base owner/name --verify",
        lambda d: [f"{d['tensors']} tensors", size(d["bytes"]), d["base"], *_verdict(d)],
    ),
    "push": Case(
        "A owner/mine --base owner/name --dry-run --output OUT",
        lambda d: [
            text for f in d["files"] for text in (f["name"], size(f["bytes"]), f["sha256"])
        ] + [d["repo"], "nothing was sent"],
    ),
    "import": Case("A OUT --model MODEL", lambda d: [d["method"], d["format"]]),
    "fuse": Case(
        "MODEL OUT --adapter A --to mlx",
        lambda d: [f"{d['layers']} layers", d["dtype"], size(d["bytes"]), f"up to {d['effect']:.2g}"],
    ),
    "generate": Case("MODEL --adapter A --prompt Tom --max-tokens 4", lambda d: [d["text"]]),
    "combine": Case("A B OUT --how svd --rank 3", lambda d: [f"{d['layers']} layers", f"rank {d['rank']}"]),
    "data overlap": Case(
        "DATA.jsonl SVAMP --data-dir SETS",
        lambda d: [f"{d[0]['test']} {d[0]['total']} {len(d[0]['seen'])} {len(d[0]['near'])}"],
    ),
    "data show": Case(
        "DATA.jsonl --model MODEL --rows 2",
        lambda d: [f"row {one['row']}: {one['tokens']} tokens, {one['supervised']} supervised" for one in d]
        + [text for one in d for text, _ in one["pieces"]],
    ),
    "data stats": Case(
        "DATA.jsonl --model MODEL",
        lambda d: [
            f"{d['rows']} rows, {d['examples']} examples with the template {d['template']}",
            f"{d['tokens']} tokens, {d['supervised'] / d['tokens']:.0%} supervised",
            f"{d['repeated']} repeated, {d['empty']} with an empty answer",
            *(f"{share} % {length}" for share, length in d["lengths"].items() if share not in ("50", "100")),
            f"median {d['lengths']['50']}",
            f"longest {d['lengths']['100']}",
            *(f"{share:.1%} over {length}" for length, share in d["cut"].items() if share),
            f"{d['histogram'][-1][0]} {'█' * 30} {d['histogram'][-1][1]}",
            d["long_rows"] or "keeps all rows whole",
        ],
    ),
    "info": Case(
        "A",
        lambda d: [
            d["method"],
            f"rank={d['fields']['rank']}",
            *(f"{name}={size(count)}" for name, count in d["files"].items()),
            *(f"{kind}={count:,}" for kind, count in d["stored_values"].items()),
        ],
    ),
    "methods": Case("", lambda d: [about["method"] for about in d]),
    "models": Case("llama", lambda d: [d[0]["architecture"], " ".join(d[0]["targets"]["lora"])]),
    "doctor": Case("", lambda d: [f["name"] for f in d] + [f["value"] for f in d if f["name"] == "mlx"]),
}  # fmt: skip


def run(case: Case, name: str, root: Path, out: Path, *more: str) -> Result:
    words = name.split() + [
        str(out) if word == "OUT"
        else str(root / word.lower()) if re.fullmatch(r"(MODEL|A|B|SETS|[A-Z]+\.\w+)", word)
        else word
        for word in case.arguments.split()
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*words, *more])
    # doctor ends with 1 where this machine lacks something
    assert result.exit_code in ((0, 1) if name == "doctor" else (0,)), (result.output, result.exception)
    return result


@pytest.mark.parametrize("name", CASES)
def test_one_document_with_the_fields_of_the_help_and_the_figures_people_read(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_adapters.study import quickstart

    monkeypatch.setattr(quickstart, "has_torch", lambda: False)  # export's case compares with it
    case = CASES[name]
    found = json.loads(run(case, name, root, tmp_path / "json", "--json").stdout)
    help = " ".join(cli(*name.split(), "--help").stdout.split())
    (declared,) = re.findall(
        r"--json print one JSON (?:document|list, each entry with): ((?:\w+, )*\w+)", help
    )
    for entry in found if isinstance(found, list) else [found]:
        # of a folder some fields are a model's, some an adapter's: the test below has both
        assert set(entry) == set(declared.split(", ")) or name == "info"
    words = " ".join(run(case, name, root, tmp_path / "words").stdout.split())
    for figure in case.figures(found):
        assert figure.strip()
        assert " ".join(figure.split()) in words, (figure, words)


def test_the_help_of_info_names_what_models_and_adapters_have(root: Path) -> None:
    both = [json.loads(cli("info", root / name, "--json").stdout) for name in ("model", "a")]
    help = " ".join(cli("info", "--help").stdout.split())
    assert {key for found in both for key in found} == set(
        help.partition("document: ")[2].split(" --help")[0].split(", ")
    )


def test_every_command_has_it_or_is_named_here() -> None:
    options = {name: {o for p in command.params for o in p.opts} for name, command in commands()}
    assert {name for name, found in options.items() if "--json" not in found} == WITHOUT
    assert set(CASES) == set(options) - WITHOUT - {"harness"}  # needs lm_eval: test_harness.py


def test_an_error_is_one_line_on_stderr_and_nothing_on_stdout(root: Path) -> None:
    result = cli("info", root / "nowhere", "--json", code=2)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_failed_verification_is_a_document_too(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlx_adapters.convert import peft

    verdict = peft.Verdict(
        peft_diff=float("nan"), auto_diff=None, bound=0.1, effect=1.0,
        greedy_equal=False, tokens=60, missing=("x",), unexpected=(),
    )  # fmt: skip
    monkeypatch.setattr(peft, "verify", lambda folder, model: verdict)
    text = cli(
        "export",
        root / "a",
        tmp_path / "out",
        "--base",
        "o/n",
        "--verify",
        "--model",
        root / "model",
        "--json",
        code=1,
    ).stdout
    assert "NaN" not in text  # JSON has no such word
    assert json.loads(text)["verify"] == {
        "peft_diff": None, "auto_diff": None, "bound": 0.1, "effect": 1.0, "greedy_equal": False,
        "tokens": 60, "missing": ["x"], "unexpected": [], "answer_equal": None, "passed": False,
    }  # fmt: skip


def test_json_is_asked_for_by_one_run_and_not_the_next(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("info", root / "a", "--json")
    cli("info", root / "nowhere", "--json", code=2)
    report({}, lambda: print("words"))
    assert capsys.readouterr().out == "words\n"
