"""Which files of a folder are the model: transformers' rule, for loading, converting and recognising it."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import make_tiny

from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.errors import CheckpointError
from mlx_adapters.models import load as model

torch = pytest.importorskip("torch")
IDS = [[1, 4, 5, 6, 7, 9, 33, 12, 8]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape: `old` in shards and `old-bin`, `new` in one file."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("old", "new")):
        make_tiny("llama", root / "made", seed=seed).rename(root / f"{name}-one")
    for kind in ("old", "old-bin"):
        shutil.copytree(root / "old-one", root / kind)
        (root / kind / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(root / "old-one").save_pretrained(
        root / "old", max_shard_size="20KB"
    )
    weights = load_file(root / "old-one" / "model.safetensors")
    torch.save(weights, root / "old-bin" / "pytorch_model.bin")
    return root


def beside_shards(root: Path, to: Path) -> None:
    shutil.copytree(root / "old", to)
    shutil.copy(root / "new-one" / "model.safetensors", to)


def a_shard_too_many(root: Path, to: Path) -> None:
    shutil.copytree(root / "old", to)
    shutil.copy(root / "new-one" / "model.safetensors", to / "model-00001-of-00001.safetensors")


def a_variant(root: Path, to: Path) -> None:
    shutil.copytree(root / "new-one", to)
    shutil.copy(root / "old-one" / "model.safetensors", to / "model.old.safetensors")


def an_index_left_over(root: Path, to: Path) -> None:
    shutil.copytree(root / "new-one", to)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))


def bins_beside_it(root: Path, to: Path) -> None:
    shutil.copytree(root / "new-one", to)
    shutil.copy(root / "old-bin" / "pytorch_model.bin", to)


ARRANGED = [beside_shards, a_shard_too_many, a_variant, an_index_left_over, bins_beside_it]


def theirs(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(IDS)).logits.numpy()


def ours(folder: Path) -> np.ndarray:
    return np.array(model.load(folder).model(mx.array(IDS)))


@pytest.mark.parametrize("arranged", ARRANGED)
def test_stale_weight_files_are_not_the_model(arranged: Any, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    arranged(made, folder)
    expected = theirs(folder)
    plain = made / ("old" if np.abs(expected - theirs(made / "old")).max() < 1e-4 else "new-one")
    other = made / ("new-one" if plain.name == "old" else "old")
    assert np.abs(expected - theirs(other)).max() > 1e-2  # the check can fail
    np.testing.assert_allclose(ours(folder), expected, atol=1e-4)
    np.testing.assert_allclose(ours(convert(folder, tmp_path / "converted").path), expected, atol=1e-4)
    assert model.fingerprint(folder) == model.fingerprint(plain)


def test_of_bin_files_one_counts_too(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(made / "old-bin", folder)
    other = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: array + 1 for name, array in other.items()}, folder / "pytorch_model_old.bin")
    np.testing.assert_allclose(ours(convert(folder, tmp_path / "converted").path), theirs(folder), atol=1e-4)


def test_shards_without_their_index_are_no_model(made: Path, tmp_path: Path) -> None:
    """transformers refuses them too."""
    folder = tmp_path / "folder"
    shutil.copytree(made / "old", folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        theirs(folder)
    for read in (model.load, lambda place: convert(place, tmp_path / "converted")):
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*index\.json"):
            read(folder)


def test_a_shard_that_is_missing_is_named_when_loading(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(made / "old", folder)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ shards are missing \({lost.name}\)"):
        model.load(folder)
