"""The file for torch users without any adapter library: every method on every architecture, the same logits.

Also an independent computation of our formulas: it shares no code with the MLX layers.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import ARCHITECTURES, METHODS, Method, pairs, sampled
from tiny import make_tiny

from mlx_adapters import adapter
from mlx_adapters.adapter.call import call_model
from mlx_adapters.convert import peft
from mlx_adapters.convert.fuse import fuse
from mlx_adapters.convert.load_adapter import load_adapter
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models import load as model

TORCH_IDS = torch.tensor(IDS.tolist())


def base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        folder / "torch", dtype=torch.float32, attn_implementation="eager"
    )
    return network.eval()


@pytest.mark.parametrize(("case", "arch"), sampled(pairs()))
def test_same_logits(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    expected = logits(loaded)
    plain = base(folders[arch])
    with torch.no_grad():
        without = plain(TORCH_IDS).logits.numpy()
        theirs = load_adapter(plain, tmp_path)(TORCH_IDS).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))
    assert np.abs(theirs - without).max() > 1e-2, "the negative control: the base alone must not pass"


@pytest.mark.parametrize(
    "case", ["lora", "dora", "series", "seq_bn", "loreft", "prompt", "ptuning", "prefix", "fusion"]
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_same_tokens(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Cached generation here and there, for a ragged batch here."""
    loaded, meta = attached(folders[arch], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    rows = [[4, 5, 6], [9, 8, 7, 6, 5, 4, 11], [12, 4]]
    ours = dict(generate_ids(loaded.model, rows, stop=frozenset(), max_tokens=12, batch_size=3))
    network = load_adapter(base(folders[arch]), tmp_path)
    for index, row in enumerate(rows):
        with torch.no_grad():
            made = network.generate(
                torch.tensor([row]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert made[0].tolist() == row + ours[index]


@pytest.mark.parametrize("case", ["lora", "seq_bn", "loreft", "prompt", "prefix"])
def test_a_padded_batch(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Rows padded on the left give the tokens they give alone."""
    loaded, meta = attached(folders["llama"], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    network = load_adapter(base(folders["llama"]), tmp_path)
    ids = torch.tensor([[0, 0, 4, 5, 6], [9, 8, 7, 6, 5]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        made = network.generate(ids, attention_mask=(ids > 0).long(), pad_token_id=0, **options)
    ours = dict(
        generate_ids(loaded.model, [[4, 5, 6], [9, 8, 7, 6, 5]], stop=frozenset(), max_tokens=8, batch_size=2)
    )
    assert [row[5:].tolist() for row in made] == [ours[0], ours[1]]


OTHERS = {
    "every side post": Method("series", {"bottleneck_size": 4, "side": "post", "targets": "all-linear"}),
    "every side pre": Method("series", {"bottleneck_size": 4, "side": "pre", "targets": "mlp,o_proj"}),
    "embedding and head": Method("lora", {"targets": "embed_tokens,q_proj", "modules_to_save": "lm_head"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_same_logits_of_other_fields(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders["llama"], OTHERS[name], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    expected = logits(loaded)
    with torch.no_grad():
        theirs = load_adapter(base(folders["llama"]), tmp_path)(TORCH_IDS).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))


@pytest.mark.parametrize(
    "case", ["dora", "ia3", "vera", "series", "parallel-learned", "seq_bn", "lora-rslora"]
)
def test_fusion_of_other_methods(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for number, name in enumerate(("lora", case)):
        loaded, meta = attached(folders["llama"], METHODS[name], trained=True)
        adapter.save(loaded.model, tmp_path / str(number), meta=meta)
    fused = Method("fusion", {"adapters": f"{tmp_path / '0'},{tmp_path / '1'}", "width": 5})
    loaded, meta = attached(folders["llama"], fused, trained=True)
    adapter.save(loaded.model, tmp_path / "fused", meta=meta)
    expected = logits(loaded)
    with torch.no_grad():
        theirs = load_adapter(base(folders["llama"]), tmp_path / "fused")(TORCH_IDS).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))


@pytest.mark.parametrize("case", sorted({row.name: case for case, row in METHODS.items()}.values()))
def test_half_precision(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The base in bfloat16, here and there: no further apart than two ways to round."""
    loaded, meta = attached(folders["llama"], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    exact = logits(loaded)
    half = model.load(folders["llama"], dtype="bfloat16")
    adapter.load(half, tmp_path)
    half.model.eval()
    ours = np.array(call_model(half.model, IDS).astype(mx.float32))
    network = base(folders["llama"]).to(torch.bfloat16)
    with torch.no_grad():
        out = load_adapter(network, tmp_path)(TORCH_IDS).logits
    assert out.dtype == torch.bfloat16
    assert np.abs(out.float().numpy() - exact).mean() < 2 * np.abs(ours - exact).mean()


@pytest.mark.parametrize("case", ["lora", "seq_bn"])
def test_the_card_s_example_runs(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders["llama"], METHODS[case], trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    expected = logits(loaded)
    peft.export(tmp_path / "a", tmp_path / "b", base=str(folders["llama"] / "torch"))
    card = (tmp_path / "b" / "README.md").read_text()
    code = (
        card.partition("```python\n")[2]
        .partition("```")[0]
        .replace("PATH/OF/THIS/FOLDER", str(tmp_path / "b"))
    )
    made: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "b"))
        exec(code, made)
    with torch.no_grad():
        theirs = made["model"].eval()(TORCH_IDS).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))


# transformers -> where a Python with it is named
OLDER = {"4.57": "MLX_ADAPTERS_HUB_PYTHON", "4.51": "MLX_ADAPTERS_T451_PYTHON"}
OLDER_PAIRS = [
    *[(case, "llama") for case in sorted({row.name: case for case, row in METHODS.items()}.values())],
    *[(case, arch) for arch in ARCHITECTURES[1:] for case in ("lora", "prefix")],
]
# mixtures, and frequencies of positions that the two ways of writing a configuration spell differently
LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
}
OLDER_FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "llama-scaled")


@pytest.fixture(scope="module", params=OLDER)
def older(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[np.ndarray, list[np.ndarray]]]:
    """(ours, theirs) of every pair, theirs from one process with that transformers."""
    python = os.environ.get(OLDER[request.param], "")
    if not python:
        pytest.skip(
            f"{OLDER[request.param]} names no Python with transformers {request.param} (.ci/run does)"
        )
    root = tmp_path_factory.mktemp("older")
    ours, jobs = {}, []
    for arch in OLDER_FUSED:
        place = root / f"fused-{arch}"
        name, _, scaled = arch.partition("-")
        source = make_tiny(name, place, **(LLAMA3_ROPE if scaled else {}))
        loaded, meta = attached(source, Method("lora", {"rank": 2, "targets": "attn"}), trained=True)
        adapter.save(loaded.model, place / "a", meta=meta)
        fuse(source, place / "a", place / "fused")
        ours["fused", arch] = logits(loaded)
        jobs.append([str(place / "fused"), "", str(place / "fused.npy")])
    for case, arch in OLDER_PAIRS:
        place = root / f"{case}-{arch}"
        loaded, meta = attached(folders[arch], METHODS[case], trained=True)
        adapter.save(loaded.model, place / "a", meta=meta)
        peft.export(place / "a", place / "b", base="owner/base")
        ours[case, arch] = logits(loaded)
        jobs.append([str(folders[arch] / "torch"), str(place / "b"), str(place / "out.npy")])
        if METHODS[case].mergeable:
            fuse(folders[arch], place / "a", place / "fused")
            jobs.append([str(place / "fused"), "", str(place / "fused.npy")])
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "ids.json").write_text(json.dumps(IDS.tolist()))
    script = Path(__file__).parents[1] / "support" / "reference" / "older.py"
    command = [python, str(script), str(root / "jobs.json"), str(root / "ids.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        pair: (logits, [np.load(file) for file in sorted((root / "-".join(pair)).glob("*.npy"))])
        for pair, logits in ours.items()
    }


@pytest.mark.parametrize(("case", "arch"), [*OLDER_PAIRS, *(("fused", arch) for arch in OLDER_FUSED)])
def test_transformers_4_computes_the_same(case: str, arch: str, older: Any) -> None:
    """Adapters through the loader, and fused checkpoints."""
    expected, theirs = older[case, arch]
    assert len(theirs) == (1 if case == "fused" else 1 + METHODS[case].mergeable)
    for computed in theirs:
        np.testing.assert_allclose(computed, expected, atol=bound(expected))


@pytest.mark.parametrize(("arch", "targets"), [("qwen3_moe", "all-linear"), ("qwen3_moe", "experts")])
def test_what_is_no_linear_layer_in_torch_is_named(arch: str, targets: str, tmp_path: Path) -> None:
    """transformers keeps a router and the experts as modules of their own kinds."""
    from transformers import AutoModelForCausalLM

    source = make_tiny(arch, tmp_path)
    loaded, meta = attached(source, Method("lora", {"rank": 2, "targets": targets}), trained=True)
    adapter.save(loaded.model, tmp_path / "a", meta=meta)
    with pytest.raises(ValueError, match="no linear layer"):
        load_adapter(AutoModelForCausalLM.from_pretrained(source), tmp_path / "a")


def test_another_model_and_an_unknown_method_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, meta = attached(folders["llama"], METHODS["lora"], trained=True)
    adapter.save(loaded.model, tmp_path, meta=meta)
    with pytest.raises(ValueError, match="another model's"):
        load_adapter(base(folders["gpt2"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LOKR"}))
    with pytest.raises(ValueError, match="LOKR"):
        load_adapter(base(folders["llama"]), tmp_path)
