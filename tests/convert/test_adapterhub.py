"""Adapters that AdapterHub's library made: read here, they compute the same; what differs is refused by name.

The library wants another transformers, so it runs in its own environment; `test_exchange.py` has the
other direction.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapted import IDS, attached, bound, logits
from cases import METHODS

from mlx_adapters import adapter
from mlx_adapters.convert import adapterhub
from mlx_adapters.errors import AdapterError, AdaptersError
from mlx_adapters.generate.decode import generate_ids
from mlx_adapters.models import load as model
from mlx_adapters.models.architectures.table import architecture

HUB = os.environ.get("MLX_ADAPTERS_HUB_PYTHON", "")
ARCHS = ("llama", "qwen2", "phi3", "phi", "glm", "gpt2", "gptj", "gpt_neox", "bloom", "opt", "gpt_neo")
# the library's parallel form has no stream to read in Phi, and no method of ours has either
NOT = {("par_bn", "phi"), ("scaled_par_bn", "phi")}
# name of ours -> their name, and fields of theirs
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "double_seq_bn": ("double_seq_bn", {}),
    "seq_bn": ("seq_bn", {"reduction_factor": 3, "non_linearity": "gelu_new"}),
    "par_bn": ("par_bn", {"leave_out": [0]}),
    "scaled_par_bn": ("scaled_par_bn", {"reduction_factor": 32 / 5 * (1 - 1e-9)}),
    "double_seq_bn-learned": ("double_seq_bn", {"scaling": "learned", "dropout": 0.1, "leave_out": [1]}),
}


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """{(form, architecture): the job with its results}, all from one process of the other environment."""
    root = tmp_path_factory.mktemp("hub")
    jobs = {}
    for form, (config, fields) in FORMS.items():
        for arch in ARCHS:
            if (form, arch) in NOT:
                continue
            place = root / f"{form}-{arch}"
            place.mkdir()
            # models whose way in the library knows by itself need no interface
            interface = architecture(arch).adapterhub
            assert interface is not None
            jobs[form, arch] = {
                "base": str(folders[arch] / "torch"),
                "folder": str(place / "theirs"),
                "config": config,
                "fields": fields,
                "interface": None if interface.known else adapterhub._interface(interface),
                "safetensors": form != "seq_bn",  # without it they write a .bin, which is their default
                "out": str(place / "out.npz"),
            }
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    (root / "ids.json").write_text(json.dumps(IDS.tolist()))
    script = Path(__file__).parents[1] / "support" / "reference" / "hub_made.py"
    command = [HUB, str(script), str(root / "jobs.json"), str(root / "ids.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {pair: job | dict(np.load(job["out"])) for pair, job in jobs.items()}


@pytest.mark.skipif(
    not HUB, reason="MLX_ADAPTERS_HUB_PYTHON names no Python with adapters==1.3.0 (.ci/run does)"
)
@pytest.mark.parametrize(
    ("form", "arch"), [(form, arch) for form in FORMS for arch in ARCHS if (form, arch) not in NOT]
)
def test_an_adapter_the_library_made_computes_the_same(
    form: str, arch: str, made: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    job = made[form, arch]
    theirs = Path(job["folder"])
    assert adapterhub.detect(theirs)
    meta = adapterhub.import_adapter(theirs, tmp_path / "ours", loaded=model.load(folders[arch]))
    assert form.partition("-")[0] == meta.method.NAME
    loaded = model.load(folders[arch])
    adapter.load(loaded, tmp_path / "ours")
    loaded.model.eval()
    assert np.abs(logits(loaded) - job["logits"]).max() <= bound(job["logits"])
    assert np.abs(job["plain"] - job["logits"]).max() > 1e-2, "the negative control"
    rows = generate_ids(loaded.model, IDS.tolist(), stop=frozenset(), max_tokens=8, batch_size=2)
    assert [row for _, row in sorted(rows)] == job["tokens"].tolist()


@pytest.fixture
def exported(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A function that exports a case for llama, with fields of AdapterHub's configuration changed."""

    def export(case: str, **changed: Any) -> Path:
        loaded, meta = attached(folders["llama"], METHODS[case], trained=True)
        adapter.save(loaded.model, tmp_path / "a", meta=meta)
        adapterhub.export(tmp_path / "a", tmp_path / "theirs")
        file = tmp_path / "theirs" / "adapter_config.json"
        about = json.loads(file.read_text())
        about["config"] |= changed
        file.write_text(json.dumps(about))
        return tmp_path / "theirs"

    return export


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("seq_bn", {"residual_before_ln": False}),
        ("seq_bn", {"residual_before_ln": "post_add"}),
        ("seq_bn", {"original_ln_after": False}),
        ("double_seq_bn", {"original_ln_after": False}),
        ("par_bn", {"original_ln_after": False}),
        ("double_seq_bn", {"ln_before": True}),
        ("double_seq_bn", {"ln_after": True}),
        ("double_seq_bn", {"use_gating": True}),
        ("double_seq_bn", {"original_ln_before": True}),
        ("double_seq_bn", {"output_adapter": False}),
        ("double_seq_bn", {"phm_layer": True}),
        ("seq_bn", {"inv_adapter": "nice"}),
        ("seq_bn", {"scaling": "channel"}),
        ("seq_bn", {"non_linearity": "rellu"}),
        ("par_bn", {"mh_adapter": True}),
    ],
)
def test_what_changes_their_function_is_refused_by_name(
    case: str, changed: dict[str, Any], exported: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = exported(case, **changed)
    with pytest.raises(AdaptersError, match=next(iter(changed))) as caught:
        adapterhub.import_adapter(folder, tmp_path / "ours", loaded=model.load(folders["llama"]))
    assert str(tmp_path / "theirs") in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("seq_bn", {"non_linearity": "ReLU"}),
        ("seq_bn", {"init_weights": "houlsby", "stochastic_depth": 0.0}),
        ("par_bn", {"residual_before_ln": False}),  # beside the MLP there is no residual of its own
        ("double_seq_bn", {"leave_out": []}),
    ],
)
def test_what_does_not_change_it_is_read(
    case: str, changed: dict[str, Any], exported: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = exported(case, **changed)
    adapterhub.import_adapter(folder, tmp_path / "ours", loaded=model.load(folders["llama"]))
    again, before = model.load(folders["llama"]), model.load(folders["llama"])
    adapter.load(again, tmp_path / "ours")
    adapter.load(before, tmp_path / "a")
    assert np.array_equal(logits(again), logits(before))


def test_their_size_follows_from_the_factor() -> None:
    """int(width // factor) is what the library makes of it; the plain quotient may give another."""
    pairs = [(w, size) for w in (32, 576, 768, 960, 1600, 2048, 4096, 5120) for size in range(1, w + 1)]
    assert all(int(w // adapterhub.reduction_factor(w, size)) == size for w, size in pairs)
    assert not all(int(w // (w / size)) == size for w, size in pairs)


def test_bottlenecks_of_different_sizes_are_refused(
    exported: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = exported("seq_bn")
    (folder / "pytorch_adapter.bin").unlink()
    file = folder / "adapter.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(file))
    mx.eval(tensors)
    for name in [name for name in tensors if ".1." in name]:
        if name.endswith("adapter_down.0.weight"):
            tensors[name] = mx.zeros((3, 32))
        elif name.endswith("adapter_down.0.bias"):
            tensors[name] = mx.zeros((3,))
        elif name.endswith("adapter_up.weight"):
            tensors[name] = mx.zeros((32, 3))
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(AdapterError, match=r"sizes \[3, 8\]"):
        adapterhub.import_adapter(folder, tmp_path / "ours", loaded=model.load(folders["llama"]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ("[]", "config"),
        ('{"config": {"architecture": "lora"}}', "bottleneck"),
        ("{}", "config"),
    ],
)
def test_broken_configurations_say_so(
    text: str, said: str, exported: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = exported("seq_bn")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=said):
        adapterhub.import_adapter(folder, tmp_path / "ours", loaded=model.load(folders["llama"]))


def test_an_architecture_without_a_row_is_refused(exported: Any, tmp_path: Path) -> None:
    exported("seq_bn")
    file = tmp_path / "a" / adapter.META
    about = json.loads(file.read_text())
    about["base"]["model_type"] = "olmo2"
    file.write_text(json.dumps(about))
    with pytest.raises(AdapterError, match="not olmo2"):
        adapterhub.export(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_another_models_adapter_is_refused(exported: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = exported("seq_bn")
    for arch in ("gpt2", "opt", "gpt_neox"):
        with pytest.raises(AdapterError, match="another"):
            adapterhub.import_adapter(folder, tmp_path / "ours", loaded=model.load(folders[arch]))
