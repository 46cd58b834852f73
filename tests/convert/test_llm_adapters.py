"""LLM-Adapters' folders: what its loader, a fork of PEFT 0.3, would make of ours, and ours of its own.

The fork's rules, read in its source: a list of targets is compared with the ends of the layers' names, a
pattern with the whole name; a layer that it wraps and the file does not fill starts at random; a bottleneck's
side follows from the last part of the name; `scaling` must be a float.
"""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import IDS, bound, logits
from cases import few
from reference.bottleneck import attach
from tiny import make_tiny

from mlx_adapters import adapter, methods
from mlx_adapters.convert import exchange, llm_adapters
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.to_transformers import write_transformers
from mlx_adapters.errors import AdapterError, AdaptersError
from mlx_adapters.methods import Parallel
from mlx_adapters.models import load as model
from mlx_adapters.models import sites

ARCHS = ("llama", "bloom", "gptj", "opt", "gpt_neo")
OUT_OF = ("down_proj", "dense_4h_to_h", "fc_out", "fc2", "c_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each architecture; the llama has twelve blocks, so that layer 1 is the end of 11."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for arch in ARCHS:
        more = {"num_hidden_layers": 12} if arch == "llama" else {}
        made[arch] = root / f"mlx-{arch}"
        convert(make_tiny(arch, root, **more), made[arch])
        loaded = model.load(made[arch])
        write_transformers(loaded.model, loaded.config, made[arch] / "torch")
    return made


def exported(folder: Path, method: str, fields: dict[str, Any], place: Path) -> Path:
    """Our folder in `place`/a, the fork's in `place`/theirs."""
    loaded = model.load(folder)
    config, base = methods.make(method, fields), model.describe(loaded)
    mx.random.seed(2)
    adapter.attach(loaded, config)
    meta = adapter.AdapterMeta(method=config, base=base)
    adapter.save(loaded.model, place / "a", meta=meta)
    llm_adapters.export(place / "a", place / "theirs", base="owner/base")
    return place / "theirs"


CHOICES = [
    ("series", {}),
    ("series", {"variant": "P"}),
    ("series", {"layers": "last:1"}),
    ("series", {"layers": "1", "variant": "P"}),
    ("parallel", {}),
    ("parallel", {"targets": "all-linear", "scaling": "learned"}),
    ("parallel", {"targets": "attn", "layers": "1"}),
    ("lora", {}),
    ("lora", {"layers": "1"}),
    ("lora", {"targets": "mlp", "layers": "0-1"}),
]


@pytest.mark.parametrize(
    ("arch", "method", "fields"), few(((arch, *choice) for arch, choice in product(ARCHS, CHOICES)), every=3)
)
def test_the_fork_wraps_the_layers_we_wrapped(
    method: str, fields: dict[str, Any], arch: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = {"rank": 2} if method == "lora" else {"bottleneck_size": 3}
    theirs = exported(folders[arch], method, fields | size, tmp_path)
    config = json.loads((theirs / "adapter_config.json").read_text())
    tensors = torch.load(theirs / "adapter_model.bin", weights_only=True)
    filled = {re.sub(r"\.(adapter_|lora_)[^.]*(\.weight)?$", "", name) for name in tensors}
    chosen = {name for name in hf_modules(folders[arch]) if found(config["target_modules"], name)}
    assert {f"base_model.model.{name}" for name in chosen} == filled
    for name in chosen if method == "series" else ():
        kind = "post" if name.rpartition(".")[2] in OUT_OF else "pre"
        shape = tensors[f"base_model.model.{name}.adapter_up.weight"].shape
        weight = hf_modules(folders[arch])[name]
        assert shape[0] == (weight[0] if kind == "post" else weight[1])


def found(wanted: str | list[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name.endswith(target) for target in wanted)


def hf_modules(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name of every module with a matrix, the embeddings too: its shape}."""
    loaded = model.load(folder)
    arch = loaded.config["model_type"]
    return {
        sites.to_hf(path, arch): module.weight.shape
        for path, module in loaded.model.named_modules()
        if "weight" in module and module.weight.ndim == 2
    }


def test_the_single_target_of_lora_is_a_pattern(folders: dict[str, Path], tmp_path: Path) -> None:
    """A list of one is GPT-2's fused projection to the fork: it would adapt two thirds of the rows."""
    for number, fields in enumerate(({"targets": "q_proj"}, {"targets": "q_proj", "layers": "1"})):
        place = tmp_path / str(number)
        theirs = exported(folders["llama"], "lora", fields, place)
        config = json.loads((theirs / "adapter_config.json").read_text())
        assert isinstance(config["target_modules"], str)
        assert config["enable_lora"] is None
        names = {name for name in hf_modules(folders["llama"]) if found(config["target_modules"], name)}
        assert len(names) == (1 if "layers" in fields else 12)
        llm_adapters.import_adapter(theirs, place / "b", loaded=model.load(folders["llama"]))
        one, other = (adapter.read_tensors(place / folder) for folder in "ab")
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[name], other[name]) for name in one)


def test_scaling_is_written_as_a_float(folders: dict[str, Path], tmp_path: Path) -> None:
    """The fork has no forward for an int, even from a configuration built in Python."""
    config = Parallel(scaling=4)
    text = json.dumps(config.to_peft())
    assert '"scaling": 4.0' in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"side": "pre"}, "side is not auto"),
        ({"side": "post", "variant": "P"}, "side is not auto"),
        ({"targets": "attn"}, "k_proj"),
    ],
)
def test_sides_the_fork_has_no_name_for_are_refused(
    fields: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=said):
        exported(folders["llama"], "series", fields | {"bottleneck_size": 3}, tmp_path)
    assert not (tmp_path / "theirs").exists()


def test_a_chosen_side_survives_without_our_own_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """Someone may pass on the two files that PEFT knows: the side must not fall back to the name's."""
    with pytest.raises(AdapterError, match="side is not auto"):
        exported(folders["llama"], "series", {"side": "post", "bottleneck_size": 3}, tmp_path)
    (tmp_path / "a" / adapter.META).unlink()
    assert adapter.read_meta(tmp_path / "a").method.side == "post"


# Written as the fork writes, its configuration in full ----------------------------------------------------

THEIRS: dict[str, Any] = {
    "adapter_dropout": 0.0,
    "base_model_name_or_path": "yahma/llama-7b-hf",
    "bias": "none",
    "bottleneck_size": 6,
    "inference_mode": True,
    "init_weights": "bert",
    "modules_to_save": None,
    "non_linearity": "tanh",
    "peft_type": "BOTTLENECK",
    "scaling": 1.0,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
    "use_adapterp": False,
    "use_parallel_adapter": False,
}
DEFAULTS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "bloom": ["dense_h_to_4h", "dense_4h_to_h"],
    "gptj": ["fc_in", "fc_out"],
    "opt": ["fc1", "fc2"],
    "gpt_neo": ["c_fc", "c_proj"],
}
PARALLEL = {"bloom": ["query_key_value"]}


def written_by_the_fork(folder: Path, base: Path, fields: dict[str, Any], dtype: torch.dtype) -> Path:
    torch.manual_seed(1)
    config = THEIRS | fields
    tensors = {}
    for name, (out_dims, in_dims) in sorted(hf_modules(base).items()):
        if not found(config["target_modules"], name):
            continue
        last = name.rpartition(".")[2]
        into, out_of = in_dims, out_dims
        if not config["use_parallel_adapter"]:
            into = out_of = out_dims if last in OUT_OF else in_dims
        size = config["bottleneck_size"]
        tensors[f"base_model.model.{name}.adapter_down.weight"] = (0.2 * torch.randn(size, into)).to(dtype)
        tensors[f"base_model.model.{name}.adapter_up.weight"] = (0.2 * torch.randn(out_of, size)).to(dtype)
        if config["scaling"] == "learned":
            tensors[f"base_model.model.{name}.adapter_scaling"] = (1 + torch.rand(1)).to(dtype)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


CHOSEN = (
    {},
    {"use_adapterp": True, "scaling": 4.0, "non_linearity": "relu"},
    {"use_parallel_adapter": True, "scaling": "learned", "non_linearity": "gelu_new"},
)
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(("arch", "fields", "dtype"), few(product(ARCHS, CHOSEN, TYPES), every=4))
def test_their_own_folder_computes_as_torch(
    arch: str, fields: dict[str, Any], dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    targets = DEFAULTS[arch]
    if fields.get("use_adapterp"):
        targets = targets[-1:]
    if fields.get("use_parallel_adapter"):
        targets = PARALLEL.get(arch, ["q_proj", "v_proj", "k_proj"])
    fields = fields | {"target_modules": targets}
    theirs = written_by_the_fork(tmp_path / "theirs", folders[arch], fields, dtype)
    assert llm_adapters.detect(theirs)
    meta = llm_adapters.import_adapter(theirs, tmp_path / "ours", loaded=model.load(folders[arch]))
    assert ("parallel" if fields.get("use_parallel_adapter") else "series") == meta.method.NAME
    loaded = model.load(folders[arch])
    adapter.load(loaded, tmp_path / "ours")
    loaded.model.eval()
    network = AutoModelForCausalLM.from_pretrained(
        folders[arch] / "torch", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        plain = network(torch.tensor(IDS.tolist())).logits.numpy()
        attach(network, tmp_path / "ours")
        expected = network(torch.tensor(IDS.tolist())).logits.numpy()
    assert np.abs(logits(loaded) - expected).max() <= bound(expected)
    assert np.abs(plain - expected).max() > 1e-2
    kept = torch.load(theirs / "adapter_model.bin", weights_only=True)
    ours = adapter.read_tensors(tmp_path / "ours")
    assert kept.keys() == ours.keys()
    assert all(np.array_equal(np.array(ours[name]), kept[name].float().numpy()) for name in kept)


# LoRA on parts of a fused projection ------------------------------------------------------------------------


def grouped_file(folder: Path, arch: str, enable: list[bool], rank: int, place: Path) -> dict[str, Any]:
    """The fork's folder of an adapter with `enable_lora` on every fused projection; returns its tensors."""
    name = "c_attn" if arch == "gpt2" else "query_key_value"
    fused = {path: shape for path, shape in hf_modules(folder).items() if path.endswith(name)}
    generator, tensors = torch.Generator().manual_seed(1), {}
    for path, (out, width) in fused.items():
        rows, groups = out // len(enable), sum(enable)
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(
            rank * groups, width, generator=generator
        )
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(
            rows * groups, rank, 1, generator=generator
        )
    fields = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6, "bias": "none"},
        **{"enable_lora": enable, "fan_in_fan_out": True, "merge_weights": False, "inference_mode": True},
        **{"lora_dropout": 0.05, "modules_to_save": None, "target_modules": [name]},
        "base_model_name_or_path": "owner/base",
    }
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(fields))
    torch.save(tensors, place / "adapter_model.bin")
    return tensors


@pytest.mark.parametrize("enable", [[True, False, True], [False, True], [True] * 4], ids=str)
@pytest.mark.parametrize("arch", ["bloom", "gpt2"])
def test_grouped_lora_is_read_as_the_fork_computes_it(
    arch: str, enable: list[bool], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Against the formula in torch: a grouped convolution on A x, whose groups fill those that are on."""
    if arch not in folders:
        folders = {arch: tmp_path / "mlx"}
        convert(make_tiny(arch, tmp_path / "hf"), folders[arch])
    rank, folder = 2, folders[arch]
    tensors = grouped_file(folder, arch, enable, rank, tmp_path / "theirs")
    loaded = model.load(folder)
    assert exchange.detect(tmp_path / "theirs") == "llm-adapters"
    exchange.import_adapter(tmp_path / "theirs", tmp_path / "ours", loaded=loaded)
    loaded.model.eval()
    layers = adapter.layers(loaded.model)
    assert len(layers) == len(tensors) / 2
    for path, layer in layers.items():
        name = f"base_model.model.{sites.to_hf(path, loaded.config['model_type'])}"
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        x = torch.randn(1, 5, a.shape[1], generator=torch.Generator().manual_seed(2))
        after = torch.nn.functional.conv1d((x @ a.T).transpose(1, 2), b, groups=sum(enable)).transpose(1, 2)
        rows = after.shape[-1] // sum(enable)
        update = torch.zeros(1, 5, rows * len(enable))
        for number, group in enumerate(i for i, on in enumerate(enable) if on):
            update[..., group * rows : (group + 1) * rows] = after[..., number * rows : (number + 1) * rows]
        given = mx.array(x.numpy())
        expected = np.array(layer.base(given)) + 6 / rank * update.numpy()
        np.testing.assert_allclose(np.array(layer(given)), expected, atol=1e-5 + 1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("enable", "said"),
    [([False, False], "of which one is true"), ("yes", "not a list"), ([1, 0], "not a list")],
)
def test_lists_that_are_none_are_refused(
    enable: Any, said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    grouped_file(folders["bloom"], "bloom", [True, False, True], 2, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields | {"enable_lora": enable}))
    with pytest.raises(AdaptersError, match=said):
        exchange.import_adapter(tmp_path / "a", tmp_path / "b", loaded=model.load(folders["bloom"]))
