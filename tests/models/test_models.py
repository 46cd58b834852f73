"""The models mlx-lm lacks, against transformers: whole texts, cached steps, padded batches, generation."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from tiny import make_tiny

from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.convert.verify import verify_model
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models import bloom
from mlx_adapters.models import config as model_config
from mlx_adapters.models import load as model
from mlx_adapters.train.loss import split_head

torch = pytest.importorskip("torch")

TIME = 40
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "bloom of six heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "bloom untied": ("bloom", {"tie_word_embeddings": False}),
    "bloom with the residual behind the norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "opt": ("opt", {}),
    "opt of 350M": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt with gelu": ("opt", {"activation_function": "gelu"}),
    "opt without biases": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
    "opt without its last norm": ("opt", {"_remove_final_layer_norm": True}),
    "gpt_neo": ("gpt_neo", {}),
    # mlx-lm's own, corrected here
    "glm": ("glm", {}),
    "glm with biases": ("glm", {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt_neo all local": ("gpt_neo", {"attention_types": [[["local"], 2]]}),
    "gpt_neo all global": ("gpt_neo", {"attention_types": [[["global"], 2]]}),
    "gpt_neo of four": (
        "gpt_neo",
        {"num_layers": 4, "attention_types": [[["local"], 1], [["local", "global", "local"], 1]]},
    ),
    "gpt_neo untied": ("gpt_neo", {"tie_word_embeddings": False}),
    "gpt_neo narrow": ("gpt_neo", {"intermediate_size": 48, "activation_function": "relu"}),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, the folder it came from)."""
    arch, fields = VARIANTS[request.param]
    root = tmp_path_factory.mktemp("own")
    source = make_tiny(arch, root, **fields)
    convert(source, root / "mlx")
    loaded = model.load(root / "mlx")
    loaded.model.eval()
    return loaded, source


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    network, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    return network.eval()


def ids(rows: int = 2, time: int = TIME) -> np.ndarray:
    return np.random.default_rng(0).integers(4, 64, (rows, time))


def reference(folder: Path, given: np.ndarray, **more: Any) -> np.ndarray:
    with torch.no_grad():
        return theirs(folder)(torch.tensor(given), **more).logits.numpy()


def close(ours: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(ours), expected, atol=1e-5 + 1e-5 * np.abs(expected).max())


def test_whole_texts(pair: tuple[Any, Path]) -> None:
    loaded, folder = pair
    close(loaded.model(mx.array(ids())), reference(folder, ids()))


@pytest.mark.parametrize("steps", [[1] * TIME, [2] * (TIME // 2), [7, 1, 1, 5, 20, 6]])
def test_cached_steps(steps: list[int], pair: tuple[Any, Path]) -> None:
    loaded, folder = pair
    cache, pieces, start = make_prompt_cache(loaded.model), [], 0
    for step in steps:
        pieces.append(np.array(loaded.model(mx.array(ids()[:, start : start + step]), cache=cache)))
        start += step
    close(np.concatenate(pieces, axis=1), reference(folder, ids()))


def test_right_padding_changes_nothing_before_it(pair: tuple[Any, Path]) -> None:
    loaded, folder = pair
    padded = ids()
    padded[1, 25:] = 0
    close(loaded.model(mx.array(padded))[1, :25], reference(folder, ids()[1:, :25])[0])


def test_ragged_batch_generates_what_transformers_does(pair: tuple[Any, Path]) -> None:
    loaded, folder = pair
    network = theirs(folder)
    rows = [list(map(int, row[:length])) for row, length in zip(ids(4), (3, 17, 9, 12), strict=True)]
    found = dict(generate_ids(loaded.model, rows, stop=frozenset(), max_tokens=24, batch_size=4))
    for index, row in enumerate(rows):
        alone = dict(generate_ids(loaded.model, [row], stop=frozenset(), max_tokens=24, batch_size=1))[0]
        text = list(row)
        with torch.no_grad():
            for _ in range(24):
                text.append(int(network(torch.tensor([text])).logits[0, -1].argmax()))
        assert found[index] == alone == text[len(row) :]


def test_left_padding_is_masked(pair: tuple[Any, Path]) -> None:
    """Two rows of different length prefilled together, as BatchGenerator does, against each alone."""
    loaded, folder = pair
    short, whole = ids()[1:, : TIME - 9], ids()[:1]
    batch = np.concatenate([whole, np.pad(short, ((0, 0), (9, 0)))])
    cache = [BatchKVCache([0, 9]) for _ in loaded.model.layers]
    ours = np.array(loaded.model(mx.array(batch), cache=cache))
    assert np.isfinite(ours).all()
    close(ours[0], reference(folder, whole)[0])
    close(ours[1, 9:], reference(folder, short)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_padding_is_finite_in_half_precision(dtype: str, pair: tuple[Any, Path]) -> None:
    """Nothing but padding is masked for the first columns: NaN there would spread to the text."""
    _, folder = pair
    network = model.load(folder, dtype=dtype).model
    cache = [BatchKVCache([0, 9]) for _ in network.layers]
    assert mx.isfinite(network(mx.array(ids()), cache=cache)).all().item()


def learned(network: Any, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random keys and values [1, heads, count, size] for each block: what a prefix would be."""
    probe = make_prompt_cache(network)
    network(mx.array(ids(1, 2)), cache=probe)
    random = np.random.default_rng(1)
    shapes = [(1, past.keys.shape[1], count, past.keys.shape[3]) for past in probe]
    return [tuple(random.normal(size=shape).astype(np.float32) for _ in range(2)) for shape in shapes]


def full(states: list[tuple[np.ndarray, np.ndarray]], rows: int) -> list[KVCache]:
    caches = []
    for keys, values in states:
        cache = KVCache()
        cache.update_and_fetch(*(mx.array(np.repeat(array, rows, axis=0)) for array in (keys, values)))
        caches.append(cache)
    return caches


def test_a_cache_that_starts_full(pair: tuple[Any, Path]) -> None:
    """Text behind five learned keys starts at position 5, alone, in steps and in a ragged batch."""
    from transformers import DynamicCache

    loaded, folder = pair
    states = learned(loaded.model, 5)

    def expected(given: np.ndarray) -> np.ndarray:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states):
            pair = (torch.tensor(np.repeat(array, len(given), axis=0)) for array in (keys, values))
            cache.update(*pair, number)
        return reference(folder, given, past_key_values=cache)

    wanted = expected(ids())
    close(loaded.model(mx.array(ids()), cache=full(states, 2)), wanted)
    cache = full(states, 2)
    parts = np.split(ids(), [1, 2, 5, 30], axis=1)
    close(np.concatenate([loaded.model(mx.array(part), cache=cache) for part in parts], axis=1), wanted)

    short = ids()[1:, :31]
    merged = [BatchKVCache.merge(list(two)) for two in zip(full(states, 1), full(states, 1), strict=True)]
    for past in merged:
        past.prepare(lengths=[TIME, 31], right_padding=[0, 9])
    padded = np.concatenate([ids()[:1], np.pad(short, ((0, 0), (0, 9)))])
    ours = np.array(loaded.model(mx.array(padded), cache=merged))
    close(ours[0], wanted[0])
    close(ours[1, :31], expected(short)[0])
    for past in merged:
        past.finalize()
    more = ids(2, 3)
    after = np.array(loaded.model(mx.array(more), cache=merged))
    close(after[0], expected(np.concatenate([ids()[:1], more[:1]], axis=1))[0, -3:])
    close(after[1], expected(np.concatenate([short, more[1:]], axis=1))[0, -3:])


def test_written_back_for_transformers(pair: tuple[Any, Path], tmp_path: Path) -> None:
    loaded, folder = pair
    written = write_transformers(loaded.model, loaded.config, tmp_path / "back")
    expected = reference(folder, ids())
    assert np.array_equal(reference(written, ids()), expected)


def test_head_is_found(pair: tuple[Any, Path]) -> None:
    """Training then computes logits only where a token is predicted."""
    assert split_head(pair[0].model) is not None


def test_four_bits(pair: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = pair
    convert(folder, tmp_path / "four", bits=4, group_size=32)
    verdict = verify_model(folder, tmp_path / "four")
    assert not verdict.lossless
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("arch", "fields", "other"),
    [
        ("gpt_neo", {}, {"window_size": 12}),
        ("bloom", {}, {"apply_residual_connection_post_layernorm": True}),
        ("opt", {}, {"activation_function": "gelu"}),
    ],
)
def test_another_configuration_is_another_function(
    arch: str, fields: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    """The negative control: what the fields above decide is visible in the logits."""
    folder = make_tiny(arch, tmp_path, **fields)
    expected = reference(folder, ids())
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    assert np.abs(np.array(model.load(folder).model(mx.array(ids()))) - expected).max() > 1e-2


def test_other_slopes_are_another_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of ALiBi: eight heads' slopes for six heads."""
    folder = make_tiny("bloom", tmp_path, n_head=6, hidden_size=48)
    monkeypatch.setattr(bloom, "slopes", lambda heads: [2.0 ** -(i + 1) for i in range(heads)])
    ours = model.load(folder).model(mx.array(ids()))
    assert np.abs(np.array(ours) - reference(folder, ids())).max() > 1e-2


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 14, 20, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(bloom.slopes(heads), theirs.numpy(), rtol=1e-6)


def test_alibi_takes_masks_of_every_form() -> None:
    """A name, what may be seen, or what is added to the scores: the same array."""
    seen = create_causal_mask(3, 4)
    by_name = bloom.alibi(2, 3, 7, "causal", mx.float32)
    added = mx.where(seen, 0.0, -mx.inf)
    for mask in (seen, seen[None, None], added):
        assert mx.array_equal(bloom.alibi(2, 3, 7, mask, mx.float32).reshape(by_name.shape), by_name)
    last = bloom.alibi(2, 1, 7, None, mx.float32)
    assert mx.array_equal(last, by_name[:, -1:])
    for dtype in (mx.float16, mx.bfloat16):
        assert bloom.alibi(2, 3, 7, seen, dtype).dtype == dtype
        nothing = bloom.alibi(2, 3, 7, mx.zeros((3, 7), mx.bool_), dtype)
        assert mx.isfinite(mx.softmax(nothing - 1000, axis=-1)).all()


@pytest.mark.parametrize("arch", ["opt", "gpt_neo"])
def test_a_text_longer_than_the_table_of_positions_is_refused(arch: str, tmp_path: Path) -> None:
    network = model.load(make_tiny(arch, tmp_path, max_position_embeddings=16)).model
    network(mx.array(ids(1, 16)))
    with pytest.raises(UnsupportedError, match="17 tokens long, and this model has positions for 16"):
        network(mx.array(ids(1, 17)))
    for cache in (make_prompt_cache(network), [BatchKVCache([0]) for _ in network.layers]):
        network(mx.array(ids(1, 16)), cache=cache)
        with pytest.raises(UnsupportedError, match="17 tokens"):
            network(mx.array(ids(1, 1)), cache=cache)


def test_transformers_believes_the_list_of_layers(tmp_path: Path) -> None:
    """GPT-Neo's config says it twice; transformers writes both and reads `attention_layers`."""
    folder = make_tiny("gpt_neo", tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert config["attention_layers"] == ["global", "local"]
    file.write_text(json.dumps(config | {"attention_layers": ["local", "local"]}))
    close(model.load(folder).model(mx.array(ids())), reference(folder, ids()))


def test_old_names_of_fields() -> None:
    """bigscience/bloom-560m still says n_embed and num_attention_heads."""
    given = {"model_type": "bloom", "vocab_size": 64, "n_embed": 32, "n_layer": 2, "num_attention_heads": 4}
    read = model_config.normalise(given)
    assert (read["hidden_size"], read["n_head"]) == (32, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "chatglm", "pre_seq_len": 128}, "pre_seq_len"),
        # ChatGLM-6B: with P-tuning, and quantized in its own format
        ({"model_type": "chatglm", "position_encoding_2d": True, "pre_seq_len": 128}, "pre_seq_len"),
        ({"model_type": "chatglm", "position_encoding_2d": True, "quantization_bit": 4}, "quantization_bit"),
        (
            {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16},
            "rope_ratio.*ChatGLM2",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        model_config.normalise(fields)


@pytest.mark.parametrize(
    ("arch", "fields", "said"),
    [
        ("opt", {"activation_function": "laplace"}, "activation_function"),
        ("gpt_neo", {"attention_layers": ["global", "near"]}, "attention_layers"),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[["local"], 3]]}, "attention_types"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    arch: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = model.read_config(make_tiny(arch, tmp_path)) | fields
    network, args = model_config.classes(config)
    with pytest.raises(UnsupportedError, match=said):
        network(args.from_dict(config))


def test_gemma2_reads_a_ragged_batch_as_its_rows(folders: dict[str, Path]) -> None:
    """As many rows as kv heads: mlx-lm gives the mask of row n to kv head n of all rows."""
    loaded = model.load(folders["gemma2"])
    heads = loaded.model.args.num_key_value_heads
    assert heads < loaded.model.args.num_attention_heads
    prompts = [[1, *range(5, 5 + 4 * n)] for n in range(1, heads + 1)]

    def answers(rows: list[list[int]]) -> dict[int, list[int]]:
        return dict(generate_ids(loaded.model, rows, stop=frozenset(), max_tokens=8, batch_size=heads))

    assert answers(prompts) == {n: answers([prompt])[0] for n, prompt in enumerate(prompts)}
