"""PEFT's adapters as PEFT's users save them: read as PEFT computes them, or refused with the cause."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import IDS, bound, logits
from typer.testing import CliRunner

from mlx_adapters import adapter, methods
from mlx_adapters.cli.app import app
from mlx_adapters.convert import exchange
from mlx_adapters.convert.load_adapter import load_adapter
from mlx_adapters.errors import AdapterError, AdaptersError
from mlx_adapters.methods.peft_fields import check_fields
from mlx_adapters.models import load as model

peft = pytest.importorskip("peft")
TORCH_IDS = torch.tensor(IDS.tolist())
# what PEFT itself says of embeddings, norms, starts and layers that it is asked for here
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:.*EVA"),
    pytest.mark.filterwarnings("ignore:.*MiCA"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]


def base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder / "torch", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trained(folder: Path, config: Any) -> Any:
    """A model of PEFT's with every trainable array moved away from its start."""
    torch.manual_seed(0)
    network = peft.get_peft_model(base(folder), config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return network


def run(network: Any) -> np.ndarray:
    with torch.no_grad():
        return network(TORCH_IDS).logits.numpy()[:, -IDS.shape[1] :]


def ours(folder: Path, source: Path) -> np.ndarray:
    loaded = model.load(folder)
    adapter.load(loaded, source)
    loaded.model.eval()
    return logits(loaded)


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | fields)


CASES: dict[str, Callable[[], Any]] = {
    "LoRA on the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "LoRA on head and embedding": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "DoRA on the head": lambda: lora(target_modules=["q_proj", "lm_head"], use_dora=True),
    "IA3 on the head": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "lm_head"], feedforward_modules=[]
    ),
    "every norm trained": lambda: lora(modules_to_save=["norm"]),
    "LongLoRA": lambda: lora(modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "one layer": lambda: lora(layers_to_transform=[1]),
    "one layer by its number": lambda: lora(layers_to_transform=0, layers_pattern="layers"),
    "a pattern": lambda: lora(target_modules=r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"),
    "some left out": lambda: lora(target_modules="all-linear", exclude_modules=["down_proj", "lm_head"]),
    "a head that is also saved": lambda: lora(
        target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]
    ),
    **{
        f"start {start}": lambda start=start: lora(init_lora_weights=start)  # type: ignore[misc]
        for start in (False, "gaussian", "orthogonal", "mica")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_as_peft_computes_it(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """And the folder that it becomes opens in PEFT, and in torch alone."""
    folder = folders["llama"]
    network = trained(folder, CASES[case]())
    expected = run(network)
    assert np.abs(expected - run(base(folder))).max() > 1e-2
    network.save_pretrained(tmp_path / "peft")
    np.testing.assert_allclose(ours(folder, tmp_path / "peft"), expected, atol=bound(expected))
    cli = ["import", tmp_path / "peft", tmp_path / "ours", "--model", folder]
    result = CliRunner().invoke(app, [str(word) for word in cli])
    assert result.exit_code == 0, result.output
    again = peft.PeftModel.from_pretrained(base(folder), tmp_path / "ours").eval()
    np.testing.assert_allclose(run(again), expected, atol=bound(expected))
    np.testing.assert_allclose(
        run(load_adapter(base(folder), tmp_path / "ours")), expected, atol=bound(expected)
    )


# Names, as several devices and torch.compile leave them -----------------------------------------------------


def rewritten(source: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = source / "adapter_model.safetensors"
    save_file({name: array.clone().contiguous() for name, array in change(load_file(file)).items()}, file)


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "FSDP": lambda name: (
        "_fsdp_wrapped_module." + name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module.")
    ),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "checkpointing": lambda name: name.replace(".layers.1.", ".layers.1._checkpoint_wrapped_module."),
}


@pytest.fixture
def saved(folders: dict[str, Path], tmp_path: Path) -> tuple[Path, np.ndarray, Any]:
    """An adapter of PEFT's with two kinds of tensors, its logits, and the model it was saved from."""
    network = trained(
        folders["llama"], lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    network.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", run(network), network


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers_are_read(
    wrapper: str, saved: tuple[Path, np.ndarray, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """By us, and not by PEFT: such a file is not handed on as it is."""
    source, expected, _ = saved
    rewritten(source, lambda arrays: {WRAPPED[wrapper](name): array for name, array in arrays.items()})
    with pytest.raises(AdapterError, match="Write it anew first: mlx-adapters import SRC DST"):
        exchange.export(source, tmp_path / "out", format="peft", base="owner/base")
    np.testing.assert_allclose(ours(folders["llama"], source), expected, atol=bound(expected))


@pytest.mark.parametrize("whole", [False, True], ids=["the adapter", "everything"])
def test_a_plain_state_dict_is_read(
    whole: bool, saved: tuple[Path, np.ndarray, Any], folders: dict[str, Path]
) -> None:
    """Its names have the adapter's in them; and it may hold the base as well, which must be this one."""
    source, expected, network = saved
    state = {name: array for name, array in network.state_dict().items() if whole or ".default" in name}
    assert any(".lora_A.default." in name for name in state)
    assert any(".modules_to_save.default." in name for name in state)
    rewritten(source, lambda _: state)
    np.testing.assert_allclose(ours(folders["llama"], source), expected, atol=bound(expected))
    if not whole:  # PEFT reads these names too, but for those of modules_to_save
        rewritten(source, lambda _: {n.replace(".modules_to_save.default", ""): a for n, a in state.items()})
        again = peft.PeftModel.from_pretrained(base(folders["llama"]), source).eval()
        np.testing.assert_allclose(run(again), expected, atol=bound(expected))
    if whole:
        other = {name: 2 * array if ".norm." in name else array for name, array in state.items()}
        rewritten(source, lambda _: other)
        with pytest.raises(AdapterError, match=r"base's model\.norm\.weight along with other values"):
            ours(folders["llama"], source)


def test_so_it_is_where_pytorch_keeps_matrices_turned(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2's, whose head is the embedding besides."""
    network = trained(folders["gpt2"], lora(target_modules=["c_attn"], fan_in_fan_out=True))
    network.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda _: network.state_dict())
    expected = run(network)
    np.testing.assert_allclose(ours(folders["gpt2"], tmp_path), expected, atol=bound(expected))


# What is in the file ----------------------------------------------------------------------------------------


def _nan(name: str, array: Any) -> dict[str, Any]:
    return {name: array * float("nan") if "q_proj.lora_A" in name and ".1." in name else array}


def _inf(name: str, array: Any) -> dict[str, Any]:
    return {name: array / 0 if "lm_head" in name else array}


def _empty(name: str, array: Any) -> dict[str, Any]:
    return {name: torch.zeros(0) if "lora_B" in name else array}


def _a_layer_less(name: str, array: Any) -> dict[str, Any]:
    return {} if ".layers.1." in name else {name: array}


def _no_head(name: str, array: Any) -> dict[str, Any]:
    return {} if "lm_head" in name else {name: array}


def _a_layer_more(name: str, array: Any) -> dict[str, Any]:
    return {name: array, name.replace("v_proj", "o_proj").replace("lora_B", "lora_B"): array.clone()}


def _two(name: str, array: Any) -> dict[str, Any]:
    return {name: array, name.replace("lora_A.weight", "lora_A.other.weight"): array.clone()}


def _resized(name: str, array: Any) -> dict[str, Any]:
    return {name: array, "base_model.model.model.embed_tokens.weight": torch.ones(70, 32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_nan, r"1 of 9 tensors hold NaN or infinity, e\.g\. .*layers\.1\.self_attn\.q_proj\.lora_A"),
        (_inf, r"hold NaN or infinity, e\.g\. .*lm_head"),
        (_empty, "4 of 9 tensors are empty, .* DeepSpeed ZeRO-3"),
        (
            _a_layer_less,
            r"2 of 5 layers that the configuration names have no tensors here, e\.g\. model\.layers\.1",
        ),
        (_no_head, r"1 of 5 layers .* no tensors here, e\.g\. lm_head"),
        (_a_layer_more, r"2 layers have tensors, e\.g\. .*o_proj, but target_modules does not name them"),
        (_two, "is not the only tensor of its place"),
        (_resized, r"embed_tokens\.weight along, \[70, 32\], and this base has \[64, 32\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_file_is_refused_with_the_cause(
    change: Any, said: str, saved: tuple[Path, np.ndarray, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    source, _, _ = saved
    rewritten(source, lambda arrays: {k: v for name, a in arrays.items() for k, v in change(name, a).items()})
    cli = ["import", source, tmp_path / "ours", "--model", folders["llama"]]
    result = CliRunner().invoke(app, [str(word) for word in cli])
    assert result.exit_code == 2, result.output
    with pytest.raises(AdapterError, match=said):
        adapter.load(model.load(folders["llama"]), source)
    assert not (tmp_path / "ours").exists()


def test_norms_that_mlx_keeps_otherwise_are_not_read(tmp_path: Path) -> None:
    """qwen3_next's are stored from zero; mlx-lm adds one when it reads a checkpoint."""
    import samples

    from mlx_adapters.models import config as model_config

    about = samples.sample_config("qwen3_next")
    kind, args = model_config.classes(about)  # built, not run: that would compile kernels for a minute
    config = methods.make("ln_tuning", {"targets": "input_layernorm"})
    network = kind(args.from_dict(about))
    adapter.attach(network, config, model_type=about["model_type"])
    meta = adapter.AdapterMeta(method=config, base=about)
    adapter.save(network, tmp_path / "a", meta=meta)
    bare = kind(args.from_dict(about))
    adapter.build(bare, "qwen3_next", tmp_path / "a", name="it")
    with pytest.raises(
        AdapterError, match="PEFT opens no ln_tuning on input_layernorm of a qwen3_next model"
    ):
        exchange.export(tmp_path / "a", tmp_path / "p", format="peft", base="owner/base")
    (tmp_path / "a" / "mlx_adapters.json").unlink()
    with pytest.raises(AdapterError, match="which mlx-lm keeps one larger in a qwen3_next model"):
        adapter.build(bare, "qwen3_next", tmp_path / "a", name="it")


# What the configuration says --------------------------------------------------------------------------------

FIELDS = [
    *[("lora", {"init_lora_weights": start}, "init_lora_weights='") for start in ("pissa", "pissa_niter_4")],
    *[
        ("lora", {"init_lora_weights": start}, "init_lora_weights='")
        for start in ("olora", "corda", "PiSSA_NITER_16")
    ],
    *[
        ("dora", {"init_lora_weights": start}, "plain LoRA first")
        for start in ("loftq", "lora_ga", "of_next_year")
    ],
    ("lora", {"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS': .* another kind of model"),
    (
        "lora",
        {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}},
        "auto_map",
    ),
    ("ia3", {"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS'"),
    ("lora", {"bias": "head_only"}, "bias='head_only'"),
    ("lora", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ("lora", {"kasa_config": {"beta": 1e-4}}, "kasa_config"),
    ("lora", {"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ("lora", {"layer_replication": [[0, 2]]}, "layer_replication"),
    ("lora", {"trainable_token_indices": ["a"]}, "not a list of token ids"),
    ("lora", {"target_parameters": ["mlp.weight"]}, "target_parameters"),
    ("lora", {"a_field_of_next_year": {"on": True}}, "a_field_of_next_year"),
    ("lora", {"modules_to_save": "lm_head"}, "not a list of names"),
    ("dora", {"lora_bias": True}, "lora_bias=True"),
    ("ia3", {"modules_to_save": "lm_head"}, "not a list of names"),
    ("ln_tuning", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("vera", {"bias": "all"}, "bias='all'"),
    ("vera", {"save_projection": False}, "save_projection"),
    ("prompt", {"task_type": None}, "task_type"),
    ("prefix", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
    ("ptuning", {"a_field_of_next_year": 0.5}, "a_field_of_next_year"),
]


@pytest.mark.parametrize(("method", "changed", "said"), FIELDS, ids=lambda value: str(value)[:50])
def test_what_is_not_known_to_be_right_is_refused_by_name(
    method: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    kind = methods.find(method)
    fields = {"peft_type": kind.PEFT_TYPE, "task_type": "CAUSAL_LM", **kind().to_peft()}
    write(tmp_path, fields)
    assert method == adapter.read_meta(tmp_path).method.NAME
    write(tmp_path, fields | changed)
    with pytest.raises(AdaptersError, match=said):
        adapter.read_meta(tmp_path)
    unset = {name: None if name != "save_projection" else True for name in changed}
    write(tmp_path, fields | {name: value for name, value in unset.items() if name != "task_type"})
    assert method == adapter.read_meta(tmp_path).method.NAME


def write(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "kind", ["Lora", "IA3", "Vera", "LNTuning", "PrefixTuning", "PromptTuning", "PromptEncoder"]
)
def test_every_default_of_the_installed_peft_is_known(kind: str) -> None:
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM")
    fields = json.loads(json.dumps(config.to_dict(), default=str))
    check_fields(fields, methods.claiming(fields).PEFT_FIELDS)


def test_files_that_do_not_agree_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """PyTorch reads one of them, we the other."""
    from trained import make_adapter

    make_adapter(folders["llama"], tmp_path, "lora", {"rank": 4, "alpha": 8.0}, seed=0)
    write(tmp_path, adapter.read_fields(tmp_path) | {"lora_alpha": 16})
    with pytest.raises(AdapterError, match=r"lora_alpha is 16, but by mlx_adapters\.json it is 8"):
        adapter.read_meta(tmp_path)
