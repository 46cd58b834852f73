"""An answer as it is written: the text and the draws are those of transformers."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from spoken import make_speaker
from tiny import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.generate.conversation import Conversation
from mlx_adapters.generate.sampling import penalties, sampler
from mlx_adapters.generate.stream import Detokenizer
from mlx_adapters.models import load as models
from mlx_adapters.serve.engine import Engine
from mlx_adapters.serve.requests import CompletionRequest

PROMPT = "tom has 3"


def pieces(tokenizer: Any, prompt: list[int], answer: list[int]) -> list[str]:
    text = Detokenizer(tokenizer, prompt)
    return [*(text.add(token) for token in answer), text.rest()]


def behind(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """transformers' decoding of both, from where the prompt ends."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *answer]))
    assert whole.startswith(before)
    return str(whole[len(before) :])


@pytest.mark.parametrize("name", ["SmolLM2", "TinyLlama"])
def test_the_pieces_of_any_tokens_are_transformers_decoding(name: str, tmp_path: Path) -> None:
    """Random tokens, special ones and characters of several tokens among them, many more than are decoded
    again; where tokens are bytes also halves of characters. (sentencepiece's are not tried: a run of bytes
    that is no text becomes unreadable as a whole, and what was written of it cannot be taken back.)"""
    tokenizer = AutoTokenizer.from_pretrained(make_speaker(name, tmp_path))
    source = random.Random(4)
    whole = [index for index in range(len(tokenizer)) if "<0x" not in tokenizer.convert_ids_to_tokens(index)]
    for length in (1, 2, 300, 300, 300):
        prompt = tokenizer.encode(source.choice([PROMPT, "日本語" * 20]))
        answer: list[int] = []
        while len(answer) < length:
            answer += source.choice(
                [[source.choice(whole)], tokenizer.encode("é日🙂" * source.randint(1, 9))]
            )
        got = pieces(tokenizer, prompt, answer)
        assert "".join(got) == behind(tokenizer, prompt, answer)
        assert length < 300 or sum(map(bool, got)) > 60, "it comes in pieces"
    (word,) = tokenizer.encode("tom" if name == "TinyLlama" else " tom", add_special_tokens=False)
    assert "".join(pieces(tokenizer, prompt, [word])) == " tom"


def test_text_that_transformers_cleans_up_comes_cleaned() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["it", "does", "n't", ".", "matter", ",", "'s", "ok", "!", "'", "?", "a"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=True)
    source = random.Random(0)
    for _ in range(50):
        answer = [source.randrange(len(words)) for _ in range(40)]
        assert "".join(pieces(tokenizer, [0], answer)) == behind(tokenizer, [0], answer)


@pytest.fixture(scope="module", params=["SmolLM2", "TinyLlama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that transformers opens too, with a tokenizer of bytes or sentencepiece's."""
    made = make_tiny("llama", tmp_path_factory.mktemp("stream"), vocab_size=400)
    return make_speaker(request.param, made)


def written_by_transformers(folder: Path, prompt: list[int], count: int, stop: set[int]) -> str:
    import torch

    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = network.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(stop),
        pad_token_id=0,
    )[0].tolist()
    return behind(tokenizer, prompt, ids[len(prompt) :])


def test_generate_chat_and_serve_write_what_transformers_writes(folder: Path) -> None:
    loaded = models.load(folder)
    prompt, stop = loaded.tokenizer.encode(PROMPT), loaded.tokenizer.eos_token_ids
    expected = written_by_transformers(folder, prompt, 24, stop)
    command = ["generate", str(folder), "--prompt", PROMPT, "--template", "plain", "--max-tokens", "24"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(done.stdout)["text"] == expected
    assert CliRunner().invoke(app, command).stdout == expected + "\n"
    chat = Conversation(loaded, template="plain", max_tokens=24)
    chat.turns = [{"role": "user", "content": PROMPT}]
    assert "".join(chat.answer()) == expected
    assert asked(loaded, prompt=PROMPT, max_tokens=24) == expected


def asked(loaded: Any, **fields: Any) -> str:
    """The engine's answer to one request."""
    engine = Engine(loaded, {}, name="base")
    job, text = engine.submit(CompletionRequest(model="base", **fields)), ""
    engine._take()
    while True:
        if job.deltas.empty():
            engine._turn(engine._streams.popleft())
            continue
        piece = job.deltas.get()
        assert not isinstance(piece, Exception), piece
        text += piece.text
        if piece.reason:
            return text


def test_a_sample_without_a_seed_is_new_each_time(folder: Path) -> None:
    loaded = models.load(folder)
    hot = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.5}
    assert len({asked(loaded, **hot) for _ in range(4)}) == 4
    assert asked(loaded, **hot, seed=3) == asked(loaded, **hot, seed=3) != asked(loaded, **hot, seed=4)
    command = ["generate", str(folder), "--prompt", PROMPT, "--template", "plain", "--max-tokens", "12"]
    done = CliRunner().invoke(app, [*command, "--temperature", "1.5", "--seed", "3"])
    assert done.stdout == asked(loaded, **hot, seed=3) + "\n", "the command draws as the server"


def test_what_narrows_the_draw_is_honoured(folder: Path) -> None:
    loaded = models.load(folder)
    best = asked(loaded, prompt=PROMPT, max_tokens=12)
    hot = {"prompt": PROMPT, "max_tokens": 12, "temperature": 2.0, "seed": 1}
    assert asked(loaded, **hot) != best
    assert asked(loaded, **hot, top_k=1) == asked(loaded, **hot, min_p=1.0) == best
    assert asked(loaded, **hot, top_p=0.0) == best
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert asked(loaded, prompt=PROMPT, max_tokens=12, **{name: 2.0}) != best, name


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 12, "top_p": 0.75},
        {"top_p": 0.6},
        {"top_k": 5},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1},
        {},
    ],
)
def test_draws_are_transformers_distribution(settings: dict[str, Any]) -> None:
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = mx.random.normal((1, 50), key=mx.random.key(1)) * 2
    scores = TemperatureLogitsWarper(0.8)(None, torch.tensor(logits.tolist()))
    warps = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    for name, warp in warps.items():
        if name in settings:
            scores = warp(settings[name])(torch.zeros(1, 1, dtype=torch.long), scores)
    share = torch.softmax(scores, dim=-1)[0].numpy()
    draw = sampler(0, temperature=0.8, **settings)
    counted = np.bincount([int(draw(logits).item()) for _ in range(2000)], minlength=50) / 2000
    assert (counted[share == 0] == 0).all()
    assert np.abs(counted - share).max() < 0.05  # four standard deviations


def test_penalties_are_transformers_and_openais() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = mx.random.normal((1, 30), key=mx.random.key(2)) * 3
    prompt, answer, virtual = [4, 5, 5, 29], [7, 7, 4, 7], [10**6, 10**6 + 1]
    read = mx.array([*virtual, *prompt, *answer])

    def penalised(**settings: float) -> np.ndarray:
        (apply,) = penalties(prompt, len(virtual) + len(prompt), **settings)
        return np.array(apply(read, logits))

    theirs = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([prompt + answer]), torch.tensor(logits.tolist())
    )
    np.testing.assert_allclose(penalised(repetition=1.7), theirs.numpy(), rtol=1e-6)
    counts = np.bincount(answer, minlength=30)
    openai = np.array(logits) - 0.5 * counts - 1.25 * (counts > 0)
    np.testing.assert_allclose(penalised(frequency=0.5, presence=1.25), openai, rtol=1e-6)
    assert penalties(prompt, 4) == []
