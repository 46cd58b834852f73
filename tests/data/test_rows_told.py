"""What becomes of rows: told where they are odd, written on one day, learned without an end token."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.data.sources import Rows
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.data.tokens import encode, end_id
from mlx_adapters.models import load as model
from mlx_adapters.models.chat_template import written_at
from mlx_adapters.train.trainer import Trainer


def changed(folder: Path, **fields: Any) -> Path:
    """A tiny llama whose tokenizer has other fields."""
    from transformers import AutoTokenizer

    made = make_tiny("llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(made)
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(made)
    return made


def rows(folder: Path, made: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def trainer(base: Path, data: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"steps": 6, "save_every": 2, "batch_size": 2}
    return Trainer(model.load(base), data, output=data.parent / "out", **settings, **options)


def test_a_run_resumes_on_another_day(tmp_path: Path) -> None:
    """Llama 3.2, Granite and SmolLM3 write today's date; here it is the second, and none is waited for."""
    dated = "{{ 'w' ~ (strftime_now('%S')|int % 30) ~ ' ' }}"
    dated += "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    base = changed(tmp_path, chat_template=dated)
    turns = [{"role": "user", "content": "tom has 3"}, {"role": "assistant", "content": "7"}]
    data = rows(tmp_path, [{"messages": turns}] * 4)
    begun = trainer(base, data)
    for step in begun:
        if step.step == 3:
            begun.save()
            break
    time.sleep(1.05)
    resumed = trainer(base, data, resume=True)
    assert resumed.run.step == 3
    assert resumed.run.examples == begun.run.examples
    assert [step.step for step in resumed] == [4, 5, 6]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ('strftime_now("%d %b %Y")', "31 Dec 1999"),
        ("strftime_now( '%Y-%m-%d' )", "1999-12-31"),
        ("'today' if strftime_now is defined else 'never'", "today"),
    ],
)
def test_a_template_writes_the_date_it_is_told(asked: str, expected: str, tmp_path: Path) -> None:
    base = changed(tmp_path, chat_template="{{ " + asked + " }}")
    tokenizer = model.read_tokenizer(base, {})
    with written_at(datetime(1999, 12, 31, 23, 59)):
        assert prompt_for("x", template="chat", tokenizer=tokenizer) == expected
    today = prompt_for("x", template="chat", tokenizer=tokenizer)
    assert (today == expected) == ("defined" in asked)


def test_a_tokenizer_without_an_end_token_trains_and_answers(tmp_path: Path) -> None:
    base = changed(tmp_path, eos_token=None, pad_token=None)
    config = json.loads((base / "config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        (base / name).write_text(
            json.dumps((config if name == "config.json" else {}) | {"eos_token_id": None})
        )
    assert end_id(model.load(base).tokenizer) is None
    data = rows(tmp_path, [{"prompt": "tom has 3", "completion": "7"}] * 3)
    arguments = ["train", str(base), "--data", str(data), "--output", str(tmp_path / "out"), "--steps", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "the tokenizer has no end token: answers will not learn where to end" in done.stderr
    asked = [
        "generate",
        str(base),
        "--adapter",
        str(tmp_path / "out"),
        "--prompt",
        "tom",
        "--max-tokens",
        "3",
    ]
    assert CliRunner().invoke(app, asked).exit_code == 0


def test_the_end_token_may_be_the_configurations_alone(tmp_path: Path) -> None:
    tokenizer = model.load(changed(tmp_path, eos_token=None)).tokenizer
    assert tokenizer.eos_token_id is None
    assert end_id(tokenizer) == 2
    made = encode(Rows([{"text": "tom has 3"}], "text", "here"), tokenizer, template="plain")
    assert made.examples[0].ids[-1] == 2
    assert not made.endless


def test_odd_rows_are_counted_when_training_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    made = [{"prompt": f"tom has {n}", "completion": "7"} for n in (3, 4, 3, 3)]
    made += [{"prompt": "how many", "completion": "  "}, {"prompt": "tom", "completion": "apples " * 40}]
    arguments = ["--data", str(rows(tmp_path, made)), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(
        app, ["train", str(folders["llama"]), *arguments, "--steps", "1", "--max-length", "20"]
    )
    assert done.exit_code == 0, done.output
    said = "; 1 cut at 20 tokens; 1 with an empty answer; 2 the same as an earlier row"
    assert said in done.stderr
