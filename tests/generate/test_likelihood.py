"""Likelihood of choices: what torch computes text by text, whatever is batched and cached."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapted import tiny_llama_with
from prompts import prompts
from tiny import make_tiny

from mlx_adapters.errors import DataError
from mlx_adapters.evaluate.choices import parse
from mlx_adapters.generate import likelihood
from mlx_adapters.generate.likelihood import choice_ids, loglikelihoods, pick
from mlx_adapters.generate.prefill import shared_prefix
from mlx_adapters.models.load import load

SETS = Path(__file__).parents[3] / "shared" / "data" / "test"
Choices = list[tuple[list[int], list[list[int]]]]


def items(count: int) -> Choices:
    draw = random.Random(3)
    rows = prompts(count, seed=5)
    return [(row, prompts(draw.randint(2, 5), seed=index, longest=6)) for index, row in enumerate(rows)]


def by_torch(folder: Path, given: Choices) -> list[list[float]]:
    """One whole text at a time, no cache, no batch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for prompt, choices in given:
            scores = []
            for choice in choices:
                logits = model(torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1]
                logprobs = torch.log_softmax(logits, dim=-1)
                scores.append(float(logprobs.gather(1, torch.tensor(choice)[:, None]).sum()))
            found.append(scores)
    return found


def by_us(model: Any, given: Choices, **options: Any) -> list[list[float]]:
    found = dict(loglikelihoods(model, given, **options))
    return [found[index] for index in range(len(given))]


def close(one: list[list[float]], other: list[list[float]]) -> bool:
    return all(np.allclose(a, b, atol=1e-4, rtol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gemma3_text"])
def test_ragged_choices_equal_torch(tmp_path: Path, arch: str) -> None:
    """Gemma 3's caches keep a window, which these texts are longer than."""
    window = {"num_hidden_layers": 6, "sliding_window": 8} if arch == "gemma3_text" else {}
    folder = make_tiny(arch, tmp_path, **window)
    model, given = load(folder).model, items(20)
    expected = by_torch(folder, given)
    assert np.std([score for scores in expected for score in scores]) > 1
    for batch_size in (1, 3, 16):
        assert close(by_us(model, given, batch_size=batch_size), expected)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_a_prefix_that_all_prompts_share_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    loaded = tiny_llama_with(method, tmp_path)
    template = prompts(1, seed=9, longest=1)[0] * 20
    given = [(template + prompt, choices) for prompt, choices in items(9)]
    read = []

    def spy(*arguments: Any) -> Any:
        read.append(shared_prefix(*arguments))
        return read[-1]

    monkeypatch.setattr(likelihood, "shared_prefix", spy)
    shared = by_us(loaded.model, given, batch_size=4)
    assert read[0].length >= 20
    monkeypatch.setattr(likelihood, "shared_prefix", lambda model, rows: None)
    assert close(by_us(loaded.model, given, batch_size=4), shared)


def test_few_tokens_go_together_where_choices_are_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = load(make_tiny("llama", tmp_path)).model, items(9)
    expected = by_us(model, given)
    monkeypatch.setattr(likelihood, "_TOKENS", 30)
    assert close(by_us(model, given), expected)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_an_adapter_with_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base = by_us(load(make_tiny("llama", tmp_path)).model, items(6))
    loaded = tiny_llama_with(method, tmp_path)
    cached = by_us(loaded.model, items(6), batch_size=4)
    assert not close(cached, base)
    monkeypatch.setattr(likelihood, "splits", lambda model: False)
    assert close(by_us(loaded.model, items(6)), cached)


def test_both_answers_are_picked() -> None:
    assert pick([-1.0, -2.0, -3.0], [1, 1, 1]) == (0, 0)
    assert pick([-4.0, -5.0], [4, 10]) == (0, 1)


def test_nothing_to_score_is_named(tmp_path: Path) -> None:
    model = load(make_tiny("llama", tmp_path)).model
    with pytest.raises(DataError, match="item 1: "):
        list(loglikelihoods(model, [([5], [[6]]), ([5], [[6], []])]))


def test_context_and_choice_are_cut_where_lm_eval_cuts(tmp_path: Path) -> None:
    class Merging:
        """Encodes pairs of letters, so that a pair may span context and choice."""

        bos_token = None

        def encode(self, text: str, **_: Any) -> list[int]:
            return [sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]

    whole = Merging().encode("Answer: yes")
    assert choice_ids("Answer:", " yes", Merging()) == (Merging().encode("Answer:"), whole[4:])
    assert choice_ids("Answer: ", "yes", Merging()) == choice_ids("Answer:", " yes", Merging())


@pytest.mark.slow
def test_five_hundred_arc_easy_items_score_as_in_torch(smollm2: Path) -> None:
    file = SETS / "ARC-Easy" / "test.json"
    if not file.exists():
        pytest.skip(f"{file} is not here: published test sets are not part of the project")
    loaded = load(smollm2)
    given, lengths, right = [], [], []
    for row in json.loads(file.read_text())[:500]:
        choices = parse(row["instruction"], "answer")
        assert choices is not None
        context = f"Question: {choices.question}\nAnswer:"  # lm-eval's arc_easy
        cut = [choice_ids(context, f" {text}", loaded.tokenizer) for text in choices.texts.values()]
        given.append((cut[0][0], [ids for _, ids in cut]))
        lengths.append([len(text) for text in choices.texts.values()])
        right.append(list(choices.texts).index(row["answer"]))
    ours, torchs = by_us(loaded.model, given), by_torch(smollm2, given)
    counts = []
    for scores in (ours, torchs):
        picked = [pick(score, length) for score, length in zip(scores, lengths)]
        counts.append([sum(pair[which] == r for pair, r in zip(picked, right)) for which in (0, 1)])
    print("acc, acc_norm of 500: ours", counts[0], "torch", counts[1])
    assert max(abs(a - b) for a, b in zip(*counts)) <= 1
    assert counts[0][0] > 200  # far above chance
