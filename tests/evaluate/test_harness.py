"""lm-evaluation-harness: our model answers its tasks as its own torch model does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from adapted import tiny_llama_with
from spoken import make_speaker
from tiny import make_tiny
from trained import make_adapter
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.errors import ConfigError
from mlx_adapters.models.load import LanguageModel, load, read_tokenizer

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

TASKS = {
    "ours_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "ours_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["7"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "ours_end": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[label]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "ours_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAML tasks of every kind over one file of twelve questions."""
    folder = tmp_path_factory.mktemp("tasks")
    things = ["apples", "books", "the answer", "a number of coins"]
    rows = [
        {
            "question": f"Tom has {n} {things[n % 4]} and gives {n // 2} away .",
            "choices": things,
            "label": n % 4,
        }
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def test_chat_prompts_leave_thinking_to_the_template(tmp_path: Path) -> None:
    import mlx.nn as nn
    from transformers import AutoTokenizer

    from mlx_adapters.evaluate.harness import HarnessModel

    tokenizer = read_tokenizer(make_speaker("thinks when told", tmp_path), {})
    ours = HarnessModel(LanguageModel(model=nn.Module(), tokenizer=tokenizer, config={}, path=tmp_path))
    turns = [{"role": "user", "content": "how many ?"}]
    for asks in (True, False):
        theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
            turns, tokenize=False, add_generation_prompt=asks, continue_final_message=not asks
        )
        assert ours.apply_chat_template(turns, add_generation_prompt=asks) == theirs


def answers(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def test_every_kind_of_task_equals_lm_evals_torch_model(
    tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard errors too: by a formula for means, bootstrapped by lm_eval's own draws for a perplexity."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from mlx_adapters.evaluate.harness import run_tasks

    folder = make_tiny("llama", tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")  # not to fork a process that has loaded torch and MLX
        torch = simple_evaluate(
            model=HFLM(str(folder), device="cpu", dtype="float32", batch_size=1),
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )
    loaded = load(folder)
    loaded.model.eval()
    for batch_size in (1, 5):
        ours = run_tasks(loaded, list(TASKS), include_path=tasks, batch_size=batch_size)
        for mine, theirs in zip(answers(ours, "ours_choice"), answers(torch, "ours_choice"), strict=True):
            assert [score for score, _ in mine] == pytest.approx([score for score, _ in theirs], abs=1e-4)
            assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
        assert answers(ours, "ours_answer") == answers(torch, "ours_answer")
        errors = {}
        for task, metrics in torch["results"].items():
            for name, value in metrics.items():
                if isinstance(value, float):
                    assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
                    errors |= {(task, name): value} if "_stderr," in name else {}
        assert errors["ours_choice", "acc_stderr,none"] > 0
        assert errors["ours_end", "perplexity_stderr,none"] > 0
        assert os.environ.get("DISABLE_MULTIPROC") is None


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_an_adapter_answers_its_tasks(tmp_path: Path, tasks: Path, method: str) -> None:
    from mlx_adapters.evaluate.harness import run_tasks

    base = load(make_tiny("llama", tmp_path / "base"))
    base.model.eval()
    adapted = tiny_llama_with(method, tmp_path)
    adapted.model.eval()
    one, other = (run_tasks(loaded, ["ours_choice"], include_path=tasks) for loaded in (base, adapted))
    assert answers(one, "ours_choice") != answers(other, "ours_choice")
    assert other["n-samples"]["ours_choice"]["effective"] == 12


def test_a_stop_text_ends_the_answer(tmp_path: Path, tasks: Path) -> None:
    from mlx_adapters.evaluate.harness import HarnessModel

    loaded = load(make_tiny("llama", tmp_path))
    loaded.model.eval()
    model = HarnessModel(loaded)
    free = model._answers(["Tom has apples"], {"until": [], "max_gen_toks": 12})[0]
    words = free.split()
    assert len(words) > 3
    stopped = model._answers(["Tom has apples"], {"until": [words[2]], "max_gen_toks": 12})[0]
    assert stopped == free[: free.index(words[2])]


def test_the_command(tmp_path: Path, tasks: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    make_adapter(folder, tmp_path / "a", "lora", {"rank": 4}, seed=1)
    call = ["harness", str(folder), "--adapter", str(tmp_path / "a"), "--include-path", str(tasks)]
    call += ["--tasks", "ours_choice,ours_answer", "--limit", "5", "--output", str(tmp_path / "out.json")]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    found = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert set(found) == {"model", "adapter", "results", "versions", "samples"}
    assert found["samples"]["ours_choice"]["effective"] == 5
    result = found["results"]["ours_choice"]
    line = next(line.split() for line in shown.stdout.splitlines() if "acc_norm" in line)
    assert [f"{result['acc_norm,none']:.4f}", f"{result['acc_norm_stderr,none']:.4f}", "5"] == line[-3:]
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["results"] == found["results"]
    assert len(kept["samples"]["ours_choice"]) == 5


def test_what_it_refuses(tmp_path: Path, tasks: Path) -> None:
    from mlx_adapters.evaluate.harness import HarnessModel, run_tasks

    loaded = load(make_tiny("llama", tmp_path))
    with pytest.raises(ConfigError, match="knows no task no_such_task"):
        run_tasks(loaded, ["ours_choice", "no_such_task"], include_path=tasks)
    with pytest.raises(ConfigError, match="leaves no room"):
        HarnessModel(loaded)._answers(["Tom"], {"until": [], "max_gen_toks": 1 << 20})
    for options, said in (
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "ours_choice", "--include-path", str(tmp_path / "none")], "no such folder"),
    ):
        result = CliRunner().invoke(app, ["harness", str(tmp_path), *options])
        assert result.exit_code == 2
        assert said in result.stderr


@pytest.mark.parametrize("path", ["owner/of-no-data", "json"])
def test_data_that_cannot_be_loaded_are_one_line(path: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Offline: eighty lines of traceback."""
    text = f"task: away\ndataset_path: {path}\ntest_split: test\n" + TASKS["ours_choice"]
    if path == "json":
        text += f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'nothing.jsonl'}}}}}\n"
    (tmp_path / "away.yaml").write_text(text)
    command = ["harness", str(folders["llama"]), "--tasks", "away", "--include-path", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.exception
    assert done.stderr.splitlines()[-1].startswith("error: away: lm_eval cannot load it (")
