"""Adapters in other formats: opened by the real libraries, and back again bit for bit."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import IDS, attached, bound, logits
from cases import METHODS, Method, few
from typer.testing import CliRunner

from mlx_adapters import adapter, methods
from mlx_adapters.cli.app import app
from mlx_adapters.convert import exchange
from mlx_adapters.convert.torch_bin_write import write_bin
from mlx_adapters.errors import AdapterError, CheckpointError, ConfigError
from mlx_adapters.files.torch_bin import read_bin
from mlx_adapters.models import load as model

ARCHS = ("llama", "qwen2", "gemma2", "phi3", "glm", "gpt2", "gptj", "gpt_neox", "bloom", "opt", "gpt_neo")


def saved(folder: Path, method: Method, dst: Path) -> np.ndarray:
    """An adapter folder, and the logits it gives."""
    loaded, meta = attached(folder, method, trained=True)
    adapter.save(loaded.model, dst, meta=meta)
    return logits(loaded)


def equal_files(left: Path, right: Path) -> None:
    # DoRA's magnitude has two names, and PEFT reads both. It writes the shorter one, which transformers 5
    # misreads; we write the longer
    one, other = (
        {re.sub(r"_vector(\.weight)?$", "", name): a for name, a in adapter.read_tensors(folder).items()}
        for folder in (left, right)
    )
    assert set(one) == set(other)
    for name, array in one.items():
        assert mx.array_equal(array, other[name]), name


ROUND_TRIPS = [
    *[("peft", case, "llama") for case in METHODS if not case.startswith("fusion")],
    *[("peft", case, "bloom") for case in ("lora", "dora", "ia3", "vera", "prefix", "prompt")],
    *[("mlx-lm", case, arch) for case in ("lora", "dora", "lora-last-layer") for arch in ("llama", "gpt2")],
    ("mlx-lm", "lora-rslora", "qwen2"),
    *[
        ("llm-adapters", case, arch)
        for case in ("lora", "series", "series-p-bert", "parallel", "parallel-learned")
        for arch in ("llama", "bloom", "gptj", "opt", "gpt_neo")
    ],
    *[
        ("adapterhub", case, arch)
        for case in ("double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn", "series-p-bert")
        for arch in ("llama", "gpt2", "gptj", "gpt_neox", "bloom", "opt", "gemma2")
    ],
]


@pytest.mark.parametrize(("format", "case", "arch"), few(ROUND_TRIPS, every=3))
def test_there_and_back(format: str, case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Ours -> theirs -> ours -> theirs: tensors bit for bit, and the same logits."""
    expected = saved(folders[arch], METHODS[case], tmp_path / "a")
    exchange.export(tmp_path / "a", tmp_path / "theirs", format=format, base="owner/base")
    for name in ("mlx_adapters.json", "seen.txt"):
        (tmp_path / "theirs" / name).unlink(missing_ok=True)  # as if their library had written it
    assert exchange.detect(tmp_path / "theirs") == format
    meta = exchange.import_adapter(tmp_path / "theirs", tmp_path / "b", loaded=model.load(folders[arch]))
    equal_files(tmp_path / "a", tmp_path / "b")
    again = model.load(folders[arch])
    adapter.load(again, tmp_path / "b")
    again.model.eval()
    assert np.array_equal(logits(again), expected)
    assert METHODS[case].name == meta.method.NAME
    exchange.export(tmp_path / "b", tmp_path / "theirs again", format=format, base="owner/base")
    for file in sorted((tmp_path / "theirs").iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            assert file.read_bytes() == (tmp_path / "theirs again" / file.name).read_bytes()


def peft_config(name: str, arch: str) -> Any:
    """A configuration of PEFT itself, with the fields its users give."""
    import peft

    gpt2 = arch == "gpt2"
    targets = {"target_modules": ["c_attn", "mlp.c_proj"] if gpt2 else ["q_proj", "down_proj"]}
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    conv = {"fan_in_fan_out": gpt2}
    lora = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 7, **conv}
    return {
        "lora": lambda: peft.LoraConfig(**targets, **lora),
        "rslora": lambda: peft.LoraConfig(**targets, **lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**targets, **lora, use_dora=True),
        "patterns": lambda: peft.LoraConfig(
            **targets, **lora, rank_pattern={targets["target_modules"][0]: 2}, alpha_pattern={r"0\..*": 5}
        ),
        "all-linear": lambda: peft.LoraConfig(target_modules="all-linear", **lora),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM", feedforward_modules=targets["target_modules"][1:], **targets, **conv
        ),
        "vera": lambda: peft.VeraConfig(
            task_type="CAUSAL_LM", r=8, target_modules=targets["target_modules"][:1], **conv
        ),
        "ln_tuning": lambda: peft.LNTuningConfig(
            task_type="CAUSAL_LM", target_modules=["ln_1"] if gpt2 else ["input_layernorm"]
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**shape),
        "prompt": lambda: peft.PromptTuningConfig(**shape),
        "ptuning": lambda: peft.PromptEncoderConfig(**shape, encoder_hidden_size=8),
    }[name]()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # what PEFT says of norms
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "rslora",
        "dora",
        "patterns",
        "all-linear",
        "ia3",
        "vera",
        "ln_tuning",
        "prefix",
        "prompt",
        "ptuning",
    ],
)
def test_what_peft_itself_made(name: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's folder -> ours -> PEFT's: the same logits here, and the tensors bit for bit."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folders[arch] / "torch", dtype=torch.float32, attn_implementation="eager"
        )

    torch.manual_seed(0)
    theirs = get_peft_model(base(), peft_config(name, arch)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        expected = theirs(torch.tensor(IDS.tolist())).logits.numpy()[:, -IDS.shape[1] :]
        plain = base().eval()(torch.tensor(IDS.tolist())).logits.numpy()
    theirs.save_pretrained(tmp_path / "peft")
    exchange.import_adapter(tmp_path / "peft", tmp_path / "ours", loaded=model.load(folders[arch]))
    loaded = model.load(folders[arch])
    adapter.load(loaded, tmp_path / "ours")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))
    assert np.abs(expected - plain).max() > 1e-2
    exchange.export(tmp_path / "ours", tmp_path / "again", format="peft", base="owner/base")
    equal_files(tmp_path / "peft", tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again").eval()
    with torch.no_grad():
        back = again(torch.tensor(IDS.tolist())).logits.numpy()[:, -IDS.shape[1] :]
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("case", ["lora", "dora", "lora-last-layer", "lora-rslora"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gptj"])
def test_mlx_lm_computes_the_same(case: str, arch: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    expected = saved(folders[arch], METHODS[case], tmp_path / "a")
    exchange.export(tmp_path / "a", tmp_path / "theirs", format="mlx-lm")
    network = load_adapters(model.load(folders[arch]).model, str(tmp_path / "theirs"))
    network.eval()
    np.testing.assert_allclose(np.array(network(IDS)), expected, atol=bound(expected))


def test_mlx_lm_s_own_loader_takes_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    import mlx_lm

    expected = saved(folders["llama"], METHODS["lora"], tmp_path / "a")
    exchange.export(tmp_path / "a", tmp_path / "theirs", format="mlx-lm")
    network = mlx_lm.load(str(folders["llama"]), adapter_path=str(tmp_path / "theirs"))[0]
    network.eval()
    np.testing.assert_allclose(np.array(network(IDS)), expected, atol=bound(expected))


@pytest.mark.parametrize(
    ("arch", "key", "said"),
    [
        ("llama", "model.embed_tokens", "embed_tokens"),
    ],
)
def test_what_mlx_lm_adapts_and_we_do_not_is_named(
    arch: str, key: str, said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    base = folders[arch]
    network = model.load(base).model
    network.freeze()
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": [key]}
    linear_to_lora_layers(network, 2, settings)
    folder = tmp_path / "theirs"
    folder.mkdir()
    arrays = dict(tree_flatten(network.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match=said):
        exchange.import_adapter(folder, tmp_path / "ours", loaded=model.load(base))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("case", [case for case, row in METHODS.items() if methods.find(row.name).IN_PEFT])
def test_an_old_peft_folder(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights in adapter_model.bin, written by torch."""
    from safetensors.torch import load_file

    expected = saved(folders["llama"], METHODS[case], tmp_path / "a")
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(tmp_path / "a" / "adapter_config.json", old)
    torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), old / "adapter_model.bin")
    assert exchange.detect(old) == "peft"
    exchange.import_adapter(old, tmp_path / "ours", loaded=model.load(folders["llama"]))
    loaded = model.load(folders["llama"])
    adapter.load(loaded, tmp_path / "ours")
    loaded.model.eval()
    assert np.array_equal(logits(loaded), expected)


def test_an_old_folder_that_asks_to_run_code(folders: dict[str, Path], tmp_path: Path) -> None:
    saved(folders["llama"], METHODS["lora"], tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(ran),)

    torch.save({"x": Code()}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="refused"):
        exchange.import_adapter(tmp_path / "a", tmp_path / "b", loaded=model.load(folders["llama"]))
    assert not ran.exists()
    assert not (tmp_path / "b").exists()


def test_the_model_that_the_folder_names(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = saved(folders["llama"], METHODS["lora"], tmp_path / "a")
    for format in exchange.FORMATS[:1] + exchange.FORMATS[2:]:
        exchange.export(tmp_path / "a", tmp_path / format, format=format, base=str(folders["llama"]))
        done = CliRunner().invoke(app, ["import", str(tmp_path / format), str(tmp_path / f"{format}-back")])
        assert done.exit_code == 0, done.output
        loaded = model.load(folders["llama"])
        adapter.load(loaded, tmp_path / f"{format}-back")
        loaded.model.eval()
        assert np.array_equal(logits(loaded), expected)
    file = tmp_path / "peft" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in fields.items() if k != "base_model_name_or_path"}))
    done = CliRunner().invoke(app, ["import", str(tmp_path / "peft"), str(tmp_path / "no")])
    assert done.exit_code == 2
    assert "--model" in done.output


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_mlx_lm_loads_here(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Made by mlx-lm's own layers, with its own config."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    network = model.load(folders["llama"]).model
    network.freeze()
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    linear_to_lora_layers(network, 1, settings, use_dora=kind == "dora")
    mx.random.seed(0)
    moved = [
        (name, array + 0.1 * mx.random.normal(array.shape))
        for name, array in tree_flatten(network.trainable_parameters())
    ]
    network.update(tree_unflatten(moved), strict=False)
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(moved))
    fields = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    network.eval()
    expected = np.array(network(IDS))
    loaded = model.load(folders["llama"])
    exchange.import_adapter(folder, tmp_path / "ours", loaded=loaded)
    again = model.load(folders["llama"])
    adapter.load(again, tmp_path / "ours")
    again.model.eval()
    np.testing.assert_allclose(logits(again), expected, atol=bound(expected))


def test_torch_reads_the_bin(tmp_path: Path) -> None:
    arrays = {"a.weight": mx.random.normal((3, 4, 5)), "b": mx.ones((7,)), "h": mx.ones((2, 2), mx.float16)}
    arrays |= {"empty": mx.zeros((0, 3))}
    write_bin(tmp_path / "x.bin", arrays)
    read = torch.load(tmp_path / "x.bin", weights_only=True)
    mapped = torch.load(tmp_path / "x.bin", weights_only=True, mmap=True)
    ours = read_bin(tmp_path / "x.bin")
    for name, array in arrays.items():
        assert np.array_equal(read[name].numpy(), np.array(array))
        assert np.array_equal(mapped[name].numpy(), np.array(array))
        assert mx.array_equal(ours[name], array)


@pytest.mark.parametrize(
    ("format", "case", "arch", "said"),
    [
        ("mlx-lm", "series", "llama", "not series"),
        ("mlx-lm", "lora", "bloom", "no bloom"),
        ("llm-adapters", "dora", "llama", "not dora"),
        ("llm-adapters", "series", "gpt2", "not gpt2"),
        ("llm-adapters", "series-all", "llama", "q_proj"),
        ("llm-adapters", "lora-patterns", "llama", "one rank"),
        ("adapterhub", "series", "llama", "variant P"),
        ("adapterhub", "lora", "llama", "no counterpart of lora"),
        ("adapterhub", "parallel", "gpt_neo", "no counterpart of parallel"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(
    format: str, case: str, arch: str, said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    saved(folders[arch], METHODS[case], tmp_path / "a")
    with pytest.raises(AdapterError, match=said):
        exchange.export(tmp_path / "a", tmp_path / "b", format=format)
    assert not (tmp_path / "b").exists()


def test_unknown_format_and_unknown_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlx-lm"):
        exchange.export(tmp_path, tmp_path / "b", format="mlxlm")
    with pytest.raises(AdapterError, match="Looked for"):
        exchange.detect(tmp_path)


def test_a_folder_of_2023_gets_its_sides_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    """Written as LLM-Adapters does, computed by hand: W (x + f(x)) into the MLP, z + f(z) out of it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(
        folders["llama"] / "torch", dtype=torch.float32, attn_implementation="eager"
    )
    fields = {"peft_type": "BOTTLENECK", "bottleneck_size": 3, "non_linearity": "tanh", "scaling": 1.0}
    fields |= {"adapter_dropout": 0.0, "use_parallel_adapter": False, "use_adapterp": False}
    fields |= {"target_modules": ["up_proj", "down_proj"], "bias": "none", "init_weights": "bert"}
    tensors = {}
    for name, layer in base.named_modules():
        if name.endswith(("up_proj", "down_proj")):
            width = layer.in_features if name.endswith("up_proj") else layer.out_features
            down, up = torch.randn(3, width) * 0.2, torch.randn(width, 3) * 0.2
            tensors[f"base_model.model.{name}.adapter_down.weight"] = down
            tensors[f"base_model.model.{name}.adapter_up.weight"] = up

            def f(x: Any, down: Any = down, up: Any = up) -> Any:
                return torch.tanh(x @ down.T) @ up.T

            if name.endswith("up_proj"):
                layer.register_forward_pre_hook(lambda m, given, f=f: (given[0] + f(given[0]),))
            else:
                layer.register_forward_hook(lambda m, given, z, f=f: z + f(z))
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    torch.save(tensors, folder / "adapter_model.bin")
    with torch.no_grad():
        expected = base(torch.tensor(IDS.tolist())).logits.numpy()
    exchange.import_adapter(folder, tmp_path / "ours", loaded=model.load(folders["llama"]))
    loaded = model.load(folders["llama"])
    adapter.load(loaded, tmp_path / "ours")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected))


HUB = os.environ.get("MLX_ADAPTERS_HUB_PYTHON", "")
HUB_CASES = ("double_seq_bn", "seq_bn", "par_bn", "scaled_par_bn", "series-p-bert")
HUB_ARCHS = ("llama", "qwen2", "gemma2", "phi3", "glm", "gpt2", "gptj", "gpt_neox", "bloom", "opt", "gpt_neo")


@pytest.fixture(scope="module")
def hub(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(ours, theirs) of every pair, theirs from one process of the other environment."""
    root = tmp_path_factory.mktemp("hub")
    ours, jobs = {}, []
    for case in HUB_CASES:
        for arch in HUB_ARCHS:
            place = root / f"{case}-{arch}"
            ours[case, arch] = saved(folders[arch], METHODS[case], place / "a")
            exchange.export(place / "a", place / "theirs", format="adapterhub")
            jobs.append([str(folders[arch] / "torch"), str(place / "theirs"), str(place / "out.npy")])
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "ids.json").write_text(json.dumps(IDS.tolist()))
    script = Path(__file__).parents[1] / "support" / "reference" / "hub.py"
    command = [HUB, str(script), str(root / "jobs.json"), str(root / "ids.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {pair: (logits, np.load(job[2])) for (pair, logits), job in zip(ours.items(), jobs, strict=True)}


@pytest.mark.skipif(
    not HUB, reason="MLX_ADAPTERS_HUB_PYTHON names no Python with adapters==1.3.0 (.ci/run does)"
)
@pytest.mark.parametrize("case", HUB_CASES)
@pytest.mark.parametrize("arch", HUB_ARCHS)
def test_adapterhub_computes_the_same(case: str, arch: str, hub: Any) -> None:
    """The library itself, which needs another transformers: in its own environment."""
    expected, (plain, theirs) = hub[case, arch]
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))
    assert np.abs(theirs - plain).max() > 1e-2
