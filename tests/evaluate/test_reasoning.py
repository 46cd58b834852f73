"""Reasoning, from the training text to the verdict: what opens it does not swallow an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from spoken_as_published import speaker
from tiny import make_tiny

import mlx_adapters as ma
from mlx_adapters import LoRA
from mlx_adapters.adapter import read_meta
from mlx_adapters.data.reasoning import before_answer
from mlx_adapters.data.tokens import prompt_ids
from mlx_adapters.evaluate.answers import extract
from mlx_adapters.generate import decode
from mlx_adapters.models.load import read_tokenizer
from mlx_adapters.models.own_template import ChatTemplate

ANSWERS = {"a": "3", "b": "7", "c": "5", "d": "9"}
# (TRL's copy of a published template, its variables, the end of the prompt, what is written there)
ASKED = [
    ("qwen3_5_think", {"enable_thinking": True}, "<think>\n", "\n</think>\n\n{}"),
    ("qwen3_5_think", {"enable_thinking": False}, "<think>\n\n</think>\n\n", "{}"),
    ("deepseek_r1_distill", {}, "<｜Assistant｜>", "{}"),  # it asks with <think>, and writes no answer so
    ("nemotron_3_nano", {}, "<think>", "</think>{}"),
]
SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in ASKED[1::2]]


@pytest.mark.parametrize(("name", "kwargs", "prompt", "written"), [*ASKED[::2], *SLOW])
def test_answers_without_reasoning_are_learned_asked_for_and_counted(
    name: str, kwargs: dict[str, Any], prompt: str, written: str, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    base = make_tiny("llama", tmp_path, vocab_size=400, hidden_size=64, intermediate_size=128)
    speaker(template, base)
    rows = [{"instruction": f"say {each}", "output": answer} for each, answer in ANSWERS.items()]
    method = LoRA(rank=16, targets="all-linear", modules_to_save="lm_head,embed_tokens")
    options: dict[str, Any] = {"steps": 60, "lr": 1e-2, "chat_template_kwargs": kwargs or None}
    ma.train(ma.load(base), rows, method, output=tmp_path / "a", **options)
    items = [{"instruction": row["instruction"], "answer": row["output"]} for row in rows]
    (tmp_path / "test.json").write_text(json.dumps(items))
    found = ma.evaluate(base, tmp_path / "test.json", adapter=tmp_path / "a", max_tokens=16)
    for record, answer in zip(found.records, ANSWERS.values(), strict=True):
        assert record.prompt.endswith(prompt)
        assert (record.response, record.correct) == (written.format(answer), True)
    assert ma.generate(base, "say b", adapter=tmp_path / "a", max_tokens=16).endswith("7")
    removed = read_meta(tmp_path / "a").chat.unasked
    assert removed == {"deepseek_r1_distill": "<think>\n", "nemotron_3_nano": "\n"}.get(name, "")


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ("3 and 4 make 7. So 8?\n</think>\n\nThe answer is 7.", "7"),
        ("<think>\n3 apples</think>7", "7"),
        ("<|channel>thought\n3 apples<channel|>7", "7"),
        ("<think>\n3 apples, no 4", None),  # it has not come to an answer
        ("7", "7"),
        ("The answer is 7.\n<think>or 8", "7"),
    ],
)
def test_reasoning_is_no_answer(response: str, read: str | None) -> None:
    assert extract(response, "number") == read


def test_the_end_of_a_thought_stays_in_the_text_though_it_is_a_special_token(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(speaker("<think></think>{{ messages }}", tmp_path), {})
    ids = tokenizer.encode("3 or 4</think>7</s>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3 or 47"
    assert decode._text(tokenizer, ids) == "3 or 4</think>7"
    assert decode._text(tokenizer, ids[:3]) == "3 o"


@pytest.mark.parametrize(
    ("name", "kwargs", "prompt"),
    [
        ("qwen3_5_think", {}, "<think>\n\n</think>\n\n"),
        ("qwen3_5_think", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("deepseek_r1_distill", {}, "<｜Assistant｜>"),
        ("qwen2_5", {}, "<|im_start|>assistant\n"),
    ],
)
def test_choices_are_scored_where_an_answer_stands(
    name: str, kwargs: dict[str, Any], prompt: str, tmp_path: Path
) -> None:
    """Not inside the reasoning that the generation prompt opens."""
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = ChatTemplate(kwargs=kwargs).on(read_tokenizer(speaker(template, tmp_path), {}))
    text = before_answer([{"role": "user", "content": "a"}], tokenizer)
    assert text.endswith(prompt)
    assert tokenizer.encode(text, add_special_tokens=False) == prompt_ids(text, tokenizer)
