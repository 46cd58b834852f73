"""The models mlx-lm lacks, against transformers: whole texts, cached steps, padded batches, generation."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny import make_tiny

from mlx_adapters import model
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import UnsupportedError
from mlx_adapters.evaluate.decode import generate_ids
from mlx_adapters.models import config as model_config
from mlx_adapters.train.loss import split_head

TIME = 40
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "bloom of six heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "bloom with the residual behind the norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "opt": ("opt", {}),
    "opt of 350M": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt with gelu": ("opt", {"activation_function": "gelu"}),
    "opt without biases": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neo all local": ("gpt_neo", {"attention_types": [[["local"], 2]]}),
    "gpt_neo all global": ("gpt_neo", {"attention_types": [[["global"], 2]]}),
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
    import torch
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
    import torch

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
    import torch

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
    from mlx_lm.models.cache import BatchKVCache

    short, whole = ids()[1:, : TIME - 9], ids()[:1]
    batch = np.concatenate([whole, np.pad(short, ((0, 0), (9, 0)))])
    cache = [BatchKVCache([0, 9]) for _ in loaded.model.layers]
    ours = np.array(loaded.model(mx.array(batch), cache=cache))
    assert np.isfinite(ours).all()
    close(ours[0], reference(folder, whole)[0])
    close(ours[1, 9:], reference(folder, short)[0])


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
    network = model.load(tmp_path / "four").model
    assert mx.isfinite(network(mx.array(ids()))).all().item()


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
    import json

    folder = make_tiny(arch, tmp_path, **fields)
    expected = reference(folder, ids())
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    assert np.abs(np.array(model.load(folder).model(mx.array(ids()))) - expected).max() > 1e-2


def test_old_names_of_fields() -> None:
    """bigscience/bloom-560m still says n_embed and num_attention_heads."""
    given = {"model_type": "bloom", "vocab_size": 64, "n_embed": 32, "n_layer": 2, "num_attention_heads": 4}
    read = model_config.normalise(given)
    assert (read["hidden_size"], read["n_head"]) == (32, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "opt", "_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "position_encoding_2d"),
        ({"model_type": "chatglm", "pre_seq_len": 128}, "pre_seq_len"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        model_config.normalise(fields)
