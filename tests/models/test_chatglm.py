"""ChatGLM2/3 against a plain torch computation: transformers itself has no such class."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from reference.chatglm import make_weights, run
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models import load as model
from mlx_adapters.train.loss import split_head

CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "padded_vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "layernorm_epsilon": 1e-5,
    "post_layer_norm": True,
    "seq_length": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "chatglm2": {},
    "long context": {"rope_ratio": 50.0},
    "one head each": {"multi_query_attention": False},
    "biases and LayerNorm": {"add_bias_linear": True, "rmsnorm": False},
    "no bias, no last norm": {"add_qkv_bias": False, "post_layer_norm": False},
    "residual behind the norm": {"apply_residual_connection_post_layernorm": True},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    config = CONFIG | VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("chatglm")
    weights = make_weights(config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    convert(folder, folder / "mlx")
    loaded = model.load(folder / "mlx")
    loaded.model.eval()
    return loaded, weights, config


def ids(rows: int = 2, time: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(4, 64, (rows, time))


def close(ours: Any, expected: torch.Tensor) -> None:
    bound = 1e-5 + 1e-5 * float(expected.abs().max())
    np.testing.assert_allclose(np.array(ours), expected.numpy(), atol=bound)


def test_whole_texts(pair: tuple[Any, Any, Any]) -> None:
    loaded, weights, config = pair
    close(loaded.model(mx.array(ids())), run(weights, config, torch.tensor(ids())))


@pytest.mark.parametrize("steps", [[1] * 40, [7, 1, 1, 5, 20, 6]])
def test_cached_steps(steps: list[int], pair: tuple[Any, Any, Any]) -> None:
    loaded, weights, config = pair
    cache, pieces, start = make_prompt_cache(loaded.model), [], 0
    for step in steps:
        pieces.append(np.array(loaded.model(mx.array(ids()[:, start : start + step]), cache=cache)))
        start += step
    close(np.concatenate(pieces, axis=1), run(weights, config, torch.tensor(ids())))


def test_left_padding(pair: tuple[Any, Any, Any]) -> None:
    loaded, weights, config = pair
    batch = np.concatenate([ids()[:1], np.pad(ids()[1:, :31], ((0, 0), (9, 0)))])
    cache = [BatchKVCache([0, 9]) for _ in loaded.model.layers]
    ours = np.array(loaded.model(mx.array(batch), cache=cache))
    close(ours[0], run(weights, config, torch.tensor(ids()[:1]))[0])
    close(ours[1, 9:], run(weights, config, torch.tensor(ids()[1:, :31]))[0])


def test_greedy_generation(pair: tuple[Any, Any, Any]) -> None:
    loaded, weights, config = pair
    rows = [list(map(int, row[:length])) for row, length in zip(ids(3), (3, 17, 9), strict=True)]
    found = dict(generate_ids(loaded.model, rows, stop=frozenset(), max_tokens=16, batch_size=3))
    for index, row in enumerate(rows):
        text = list(row)
        for _ in range(16):
            text.append(int(run(weights, config, torch.tensor([text]))[0, -1].argmax()))
        assert found[index] == text[len(row) :]


def test_right_padding_changes_nothing_before_it(pair: tuple[Any, Any, Any]) -> None:
    loaded, weights, config = pair
    padded = ids()
    padded[1, 25:] = 0
    close(loaded.model(mx.array(padded))[1, :25], run(weights, config, torch.tensor(ids()[1:, :25]))[0])


def test_a_cache_that_starts_full(pair: tuple[Any, Any, Any]) -> None:
    """Behind the cache of a text, a text continues: its positions start there."""
    loaded, weights, config = pair
    past = make_prompt_cache(loaded.model)
    loaded.model(mx.array(ids()[:, :5]), cache=past)
    full = [KVCache() for _ in past]
    for cache, old in zip(full, past, strict=True):
        cache.keys, cache.values, cache.offset = *old.keys_and_values(), 5
    ours = loaded.model(mx.array(ids()[:, 5:]), cache=full)
    close(ours, run(weights, config, torch.tensor(ids()))[:, 5:])


def test_written_back_under_the_checkpoints_names(pair: tuple[Any, Any, Any], tmp_path: Path) -> None:
    loaded, weights, _ = pair
    back = load_file(write_transformers(loaded.model, loaded.config, tmp_path / "back") / "model.safetensors")
    assert set(back) == set(weights) - {"transformer.rotary_pos_emb.inv_freq"}
    assert all(torch.equal(array, weights[name]) for name, array in back.items())


def test_four_bits(pair: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """The quantized model computes what its rounded weights say."""
    loaded, weights, config = pair
    convert(loaded.path, tmp_path / "four", bits=4, group_size=32)
    four = model.load(tmp_path / "four")
    rounded = load_file(write_transformers(four.model, four.config, tmp_path / "back") / "model.safetensors")
    assert not torch.equal(
        rounded["transformer.output_layer.weight"], weights["transformer.output_layer.weight"]
    )
    close(four.model(mx.array(ids())), run(rounded, config, torch.tensor(ids())))


def test_head_is_found(pair: tuple[Any, Any, Any]) -> None:
    assert split_head(pair[0].model) is not None


def test_another_theta_is_another_function(pair: tuple[Any, Any, Any]) -> None:
    """The negative control."""
    loaded, weights, config = pair
    other = run(weights, config | {"rope_ratio": 3.0}, torch.tensor(ids())).numpy()
    assert np.abs(np.array(loaded.model(mx.array(ids()))) - other).max() > 1e-2


def test_verify_says_that_transformers_has_no_such_class(pair: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from mlx_adapters.convert.verify import verify_model
    from mlx_adapters.errors import UnsupportedError

    folder = pair[0].path
    with pytest.raises(UnsupportedError, match="nothing to compare"):
        verify_model(folder.parent, folder)
