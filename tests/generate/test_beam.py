"""Beam search: token for token what transformers gives."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cases import few
from mlx.utils import tree_flatten
from prompts import prompts
from tiny import make_tiny

from mlx_adapters import adapter, methods
from mlx_adapters.generate import beam
from mlx_adapters.generate.beam import beam_search
from mlx_adapters.models.load import load

SETS = Path(__file__).parents[3] / "shared" / "data" / "test"


def by_transformers(
    folder: Path, rows: list[list[int]], *, stop: list[int], max_tokens: int, beams: int, penalty: float
) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                length_penalty=penalty,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=stop,
                pad_token_id=0,
            )
        answer = out[0, len(row) :].tolist()
        ends = [index for index, token in enumerate(answer) if token in stop]
        found.append(answer[: ends[0]] if ends else answer)
    return found


def by_us(model: Any, rows: list[list[int]], stop: list[int], **options: Any) -> list[list[int]]:
    found = dict(beam_search(model, rows, stop=frozenset(stop), **options))
    return [found[index] for index in range(len(rows))]


@pytest.mark.parametrize("ends", few([3, 1], every=2))
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_forty_ragged_prompts_equal_transformers(tmp_path: Path, arch: str, ends: int) -> None:
    folder = make_tiny(arch, tmp_path)
    model, rows = load(folder).model, prompts(40)
    # often said tokens as end tokens: many beams finish, at different lengths
    said = Counter(token for answer in by_us(model, rows, [], max_tokens=12) for token in answer)
    stop = [token for token, _ in said.most_common(ends)]
    expected = by_transformers(folder, rows, stop=stop, max_tokens=12, beams=4, penalty=1.0)
    assert len({len(answer) for answer in expected}) > 4, "answers must end at different lengths"
    assert by_us(model, rows, stop, max_tokens=12, batch_size=8) == expected
    assert by_us(model, rows[:9], stop, max_tokens=12, batch_size=1) == expected[:9]


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (2, 1.0), (4, 0.0), (4, 2.5), (6, -1.0)])
def test_other_widths_and_penalties_equal_transformers(tmp_path: Path, beams: int, penalty: float) -> None:
    folder = make_tiny("llama", tmp_path, seed=3)
    model, rows = load(folder).model, prompts(12, seed=1)
    expected = by_transformers(folder, rows, stop=[2, 11], max_tokens=10, beams=beams, penalty=penalty)
    found = by_us(model, rows, [2, 11], max_tokens=10, beams=beams, length_penalty=penalty, batch_size=5)
    assert found == expected


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_the_shortest_answers_equal_transformers(tmp_path: Path, max_tokens: int) -> None:
    folder = make_tiny("llama", tmp_path)
    rows = prompts(10, seed=2)
    expected = by_transformers(folder, rows, stop=[2, 11], max_tokens=max_tokens, beams=4, penalty=1.0)
    assert by_us(load(folder).model, rows, [2, 11], max_tokens=max_tokens, batch_size=4) == expected


def test_waiting_prompts_enter_as_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = load(make_tiny("llama", tmp_path)).model, prompts(40)
    said = Counter(token for answer in by_us(model, rows, [], max_tokens=12) for token in answer)
    steps: list[list[int]] = []

    def watched(logits: mx.array, searches: Any, stop: Any) -> Any:
        steps.append([search.index for search in searches])
        return candidates(logits, searches, stop)

    candidates = beam._candidates
    monkeypatch.setattr(beam, "_candidates", watched)
    by_us(model, rows, [token for token, _ in said.most_common(3)], max_tokens=24, batch_size=8)
    taken = Counter(position for step in steps for position in step)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    apart = sum(max(taken[index] for index in order[first : first + 8]) for first in range(0, 40, 8))
    assert len(set(taken.values())) > 4, "the searches must take different numbers of steps"
    assert len(steps) < apart, (len(steps), apart)
    last = next(index for index, step in enumerate(steps) if order[-1] in step)
    assert all(len(step) == 8 for step in steps[: last + 1]), "an eighth of eight is one"


def test_four_beams_find_more_likely_answers_than_one(tmp_path: Path) -> None:
    model, rows = load(make_tiny("llama", tmp_path)).model, prompts(10)
    one = by_us(model, rows, [], max_tokens=8, beams=1)
    four = by_us(model, rows, [], max_tokens=8, beams=4)

    def likelihood(row: list[int], answer: list[int]) -> float:
        logits = model(mx.array([row + answer]))[0, len(row) - 1 : -1]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return float(mx.take_along_axis(logprobs, mx.array(answer)[:, None], axis=-1).sum())

    gains = [likelihood(row, b) - likelihood(row, a) for row, a, b in zip(rows, one, four)]
    assert min(gains) > -1e-3
    assert max(gains) > 0.01


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "series"])
def test_an_adapter_with_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    loaded = load(make_tiny("llama", tmp_path))
    fields = {"prompt": {"num_virtual_tokens": 3}, "prefix": {"num_virtual_tokens": 3}}.get(method, {})
    config = methods.make(method, fields)
    adapter.attach(loaded, config)
    shaken = {name: array + 0.3 * mx.random.normal(array.shape, key=mx.random.key(7))
              for name, array in tree_flatten(loaded.model.trainable_parameters())}  # fmt: skip
    loaded.model.load_weights(list(shaken.items()), strict=False)
    loaded.model.eval()
    rows = prompts(7, seed=4)
    cached = by_us(loaded.model, rows, [2, 11], max_tokens=8, batch_size=3)
    monkeypatch.setattr(beam, "splits", lambda model: False)
    assert by_us(loaded.model, rows, [2, 11], max_tokens=8) == cached


@pytest.mark.slow
def test_fifty_svamp_prompts_on_smollm2_equal_transformers(smollm2: Path) -> None:
    from mlx_adapters.data.templates import prompt_for
    from mlx_adapters.data.tokens import prompt_ids

    if not (SETS / "SVAMP").is_dir():
        pytest.skip(f"{SETS / 'SVAMP'} is not here: published test sets are not part of the project")
    loaded = load(smollm2)
    items = json.loads((SETS / "SVAMP" / "test.json").read_text())[:50]
    texts = [
        prompt_for(item["instruction"], template="alpaca", tokenizer=loaded.tokenizer, phase="eval")
        for item in items
    ]
    rows = [prompt_ids(text, loaded.tokenizer) for text in texts]
    stop = sorted(loaded.tokenizer.eos_token_ids)
    expected = by_transformers(smollm2, rows, stop=stop, max_tokens=32, beams=4, penalty=1.0)
    assert by_us(loaded.model, rows, stop, max_tokens=32, batch_size=4) == expected
