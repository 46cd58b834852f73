"""The file for torch users without any adapter library: every method on every architecture, the same logits.

Also an independent computation of our formulas: it shares no code with the MLX layers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import ARCHITECTURES, METHODS, pairs
from test_methods import IDS, attached, bound, logits
from tiny import make_tiny

from mlx_adapters import adapter, model
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.load_adapter import load_adapter
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.evaluate.decode import generate_ids

TORCH_IDS = torch.tensor(IDS.tolist())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each architecture, converted; what transformers opens lies beside it."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for arch in ARCHITECTURES:
        made[arch] = root / f"mlx-{arch}"
        convert(make_tiny(arch, root), made[arch])
        loaded = model.load(made[arch])
        write_transformers(loaded.model, loaded.config, root / f"mlx-{arch}" / "torch")
    return made


def base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        folder / "torch", dtype=torch.float32, attn_implementation="eager"
    )
    return network.eval()


@pytest.mark.parametrize(("case", "arch"), [pair for pair in pairs() if not pair[0].startswith("fusion")])
def test_same_logits(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(tmp_path, loaded.model, meta=meta)
    expected = logits(loaded)
    plain = base(folders[arch])
    with torch.no_grad():
        without = plain(TORCH_IDS).logits.numpy()
        theirs = load_adapter(plain, tmp_path)(TORCH_IDS).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))
    assert np.abs(theirs - without).max() > 1e-2, "the negative control: the base alone must not pass"


@pytest.mark.parametrize("case", ["lora", "dora", "series", "seq_bn", "prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_same_tokens(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Cached generation here and there, for a ragged batch here."""
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(tmp_path, loaded.model, meta=meta)
    rows = [[4, 5, 6], [9, 8, 7, 6, 5, 4, 11], [12, 4]]
    ours = dict(generate_ids(loaded.model, rows, stop=frozenset(), max_tokens=12, batch_size=3))
    network = load_adapter(base(folders[arch]), tmp_path)
    for index, row in enumerate(rows):
        with torch.no_grad():
            made = network.generate(
                torch.tensor([row]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert made[0].tolist() == row + ours[index]


def test_another_model_and_an_unknown_method_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders["llama"], METHODS["lora"], trained=True)
    adapter.save(tmp_path, loaded.model, meta=meta)
    with pytest.raises(ValueError, match="another model's"):
        load_adapter(base(folders["gpt2"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LOKR"}))
    with pytest.raises(ValueError, match="LOKR"):
        load_adapter(base(folders["llama"]), tmp_path)
