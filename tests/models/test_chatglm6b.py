"""The first ChatGLM-6B against a plain torch computation: transformers itself has no such class."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import bound
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from reference.chatglm6b import make_weights, run
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from mlx_adapters import adapter, methods
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.data.tokens import Example
from mlx_adapters.generate.decode import Decoding, generate_ids
from mlx_adapters.generate.prefill import splits
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run
from mlx_adapters.train.loss import split_head
from mlx_adapters.train.shared_prefix import can_share

MASK, GMASK, SOP, EOP = 59, 60, 63, 62
CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "layernorm_epsilon": 1e-3,
    "max_sequence_length": 256,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "bos_token_id": SOP,
    "eos_token_id": EOP,
    "pad_token_id": 3,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "quantization_bit": 0,
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}
Pair = tuple[model.LanguageModel, dict[str, torch.Tensor]]


def made(folder: Path, config: dict[str, Any]) -> Pair:
    weights = make_weights(CONFIG)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    convert(folder, folder / "mlx")
    loaded = model.load(folder / "mlx")
    loaded.model.eval()
    return loaded, weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(tmp_path_factory.mktemp("chatglm6b"), CONFIG)


def text(context: int, answer: int, seed: int = 0) -> list[int]:
    """A context, the mask, <sop>, an answer."""
    numbers = np.random.default_rng(seed).integers(4, 58, context + answer).tolist()
    return [*numbers[:context], GMASK, SOP, *numbers[context:]]


TEXTS = {
    "context and answer": text(9, 7),
    "a context alone": text(9, 0)[:-1],
    "an answer alone": text(0, 8),
    "no mask": [4, 5, 6, SOP, 7, 8],
    "a mask in the text": [4, MASK, 5, 6, SOP, 7, 8],
    "a mask, and one for the end": [4, MASK, 5, GMASK, SOP, 7, 8],
    "two starts": [4, 5, GMASK, SOP, 7, GMASK, SOP, 8, 9],
}


@pytest.mark.parametrize("name", TEXTS)
def test_whole_and_cached(name: str, pair: Pair) -> None:
    """Cached: the context at once, with or without what ends it, and the answer in steps."""
    loaded, weights = pair
    ids = TEXTS[name]
    expected = run(weights, CONFIG, ids).numpy()
    np.testing.assert_allclose(np.array(loaded.model(mx.array([ids])))[0], expected, atol=bound(expected))
    start = ids.index(SOP) if SOP in ids else len(ids)
    for cuts in ([start], [start + 1], [start, start + 1, start + 2, start + 4], range(start, len(ids))):
        cache, pieces, before = make_prompt_cache(loaded.model), [], 0
        for end in [*(cut for cut in cuts if 0 < cut < len(ids)), len(ids)]:
            pieces.append(np.array(loaded.model(mx.array([ids[before:end]]), cache=cache))[0])
            before = end
        np.testing.assert_allclose(np.concatenate(pieces), expected, atol=bound(expected))


def test_rows_with_contexts_of_their_own(pair: Pair) -> None:
    """As in a training batch, padded on the right."""
    loaded, weights = pair
    rows = [text(9, 7, 1), text(3, 8, 2), text(0, 5, 3)]
    longest = max(map(len, rows))
    ours = np.array(loaded.model(mx.array([[*row, *[3] * (longest - len(row))] for row in rows])))
    for logits, row in zip(ours, rows, strict=True):
        expected = run(weights, CONFIG, row).numpy()
        np.testing.assert_allclose(logits[: len(row)], expected, atol=bound(expected))


def test_the_first_release_names_no_masks(tmp_path: Path) -> None:
    old = {name: value for name, value in CONFIG.items() if name not in ("gmask_token_id", "mask_token_id")}
    loaded, weights = made(tmp_path, old)
    expected = run(weights, CONFIG, text(5, 4)).numpy()
    ours = np.array(loaded.model(mx.array([text(5, 4)])))[0]
    np.testing.assert_allclose(ours, expected, atol=bound(expected))


def test_a_context_sees_itself_both_ways(pair: Pair) -> None:
    """The negative control: the first token's logits depend on the context's last one, and on no answer."""
    loaded, _ = pair
    ids = text(6, 4)
    first = np.array(loaded.model(mx.array([ids])))[0, 0]
    context, answer = list(ids), list(ids)
    context[5], answer[-1] = 4, 4
    assert np.abs(np.array(loaded.model(mx.array([context])))[0, 0] - first).max() > 1e-2
    assert np.abs(np.array(loaded.model(mx.array([answer])))[0, 0] - first).max() == 0


def test_what_assumes_that_texts_look_back_is_off(pair: Pair) -> None:
    loaded, _ = pair
    assert not splits(loaded.model)
    assert not can_share(loaded.model)
    assert split_head(loaded.model) is not None


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_generation(kind: str, pair: Pair) -> None:
    loaded, weights = pair
    rows = [text(7, 0, 5), text(3, 0, 6)]
    decoding = Decoding(kind=kind, beams=1) if kind == "beam" else Decoding()
    found = dict(generate_ids(loaded.model, rows, stop=frozenset(), max_tokens=6, decoding=decoding))
    for index, row in enumerate(rows):
        ids = list(row)
        for _ in range(6):
            ids.append(int(run(weights, CONFIG, ids)[-1].argmax()))
        assert found[index] == ids[len(row) :]


def test_written_back_under_the_checkpoints_names(pair: Pair, tmp_path: Path) -> None:
    loaded, weights = pair
    folder = write_transformers(loaded.model, loaded.config, tmp_path / "back")
    back = load_file(folder / "model.safetensors")
    assert set(back) == {name for name in weights if not name.endswith("inv_freq")}
    assert all(torch.equal(array, weights[name]) for name, array in back.items())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "chatglm"


def changed(weights: dict[str, torch.Tensor], folder: Path, scale: float) -> dict[str, torch.Tensor]:
    """The weights with the LoRA updates of a folder in them."""
    arrays, own = load_file(folder / "adapter_model.safetensors"), dict(weights)
    for name, a in arrays.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = arrays[name.replace("lora_A", "lora_B")]
            own[f"{path}.weight"] = own[f"{path}.weight"] + scale * b @ a
    return own


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 2, "targets": "all-linear"}),
    ("dora", {"rank": 2}),
    ("ia3", {}),
    ("vera", {"rank": 4}),
    ("ln_tuning", {}),
    ("series", {"bottleneck_size": 3}),
    ("parallel", {"bottleneck_size": 3}),
    ("prompt", {"num_virtual_tokens": 2}),
    ("prefix", {"num_virtual_tokens": 2}),
]


@pytest.mark.parametrize(("method", "fields"), METHODS, ids=lambda value: value if value is str else "")
def test_methods_train_and_come_back(method: str, fields: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    loaded, weights = model.load(pair[0].path), pair[1]
    adapter.attach(loaded, methods.make(method, fields))
    rows = [Example(text(6, 5, seed), 8) for seed in range(2)]
    config = TrainConfig(steps=6, batch_size=2, lr=2e-2, warmup=0)
    losses = [step.loss for step in Run(loaded.model, rows, config=config)]
    assert losses[-1] < losses[0]
    assert tree_flatten(loaded.model.trainable_parameters())
    adapter.save(loaded, tmp_path / "a")
    loaded.model.eval()
    from mlx_adapters.adapter.call import call_model

    ours = np.array(call_model(loaded.model, mx.array([text(6, 5, 9)])))[0]
    again = model.load(pair[0].path)
    adapter.load(again, tmp_path / "a")
    again.model.eval()
    assert np.array_equal(np.array(call_model(again.model, mx.array([text(6, 5, 9)])))[0], ours)
    if method == "lora":
        expected = run(changed(weights, tmp_path / "a", 8.0), CONFIG, text(6, 5, 9)).numpy()
        np.testing.assert_allclose(ours, expected, atol=bound(expected))
