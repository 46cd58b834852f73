"""What PEFT trains beside low-rank updates: biases, whole modules, tokens, and DoRA's patterns.

Each is read as PEFT computes it, comes back to PEFT, trains, and is fused or says why not; or it is refused
in one line.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapted import IDS, bound, logits
from mlx.utils import tree_flatten
from tiny import make_tiny

from mlx_adapters import adapter
from mlx_adapters.convert import exchange, fuse
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.load_adapter import load_adapter
from mlx_adapters.data.tokens import Example
from mlx_adapters.errors import AdaptersError, ConfigError
from mlx_adapters.models import load as model
from mlx_adapters.train.config import TrainConfig
from mlx_adapters.train.loop import Run

peft = pytest.importorskip("peft")
TORCH_IDS = torch.tensor(IDS.tolist())
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:.*lora_bias"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
]


class Pair:
    """A tiny model as transformers wrote it, and converted."""

    def __init__(self, root: Path, arch: str, **fields: Any) -> None:
        self.torch = make_tiny(arch, root, **fields)
        self.mlx = root / "mlx"
        convert(str(self.torch), self.mlx)

    def base(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.torch, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def made(self, config: Any, folder: Path, seed: int = 0) -> np.ndarray:
        """The logits of PEFT's adapter of `config`, of which every trainable array is moved, saved to
        `folder`."""
        torch.manual_seed(seed)
        network = peft.get_peft_model(self.base(), config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        network.save_pretrained(folder)
        return run(network)


def run(network: Any) -> np.ndarray:
    with torch.no_grad():
        return network(TORCH_IDS).logits.numpy()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", {"tie_word_embeddings": False}),
        "tied": ("qwen2", {"tie_word_embeddings": True}),  # with biases on q, k and v
        "biases": ("phi", {"tie_word_embeddings": False}),  # and on everything else, the head included
        "gpt2": ("gpt2", {}),
        "gemma2": ("gemma2", {"tie_word_embeddings": True}),  # scales its embedding
    }

    def pair(name: str) -> Pair:
        if name not in made:
            arch, fields = kinds[name]
            made[name] = Pair(tmp_path_factory.mktemp(name), arch, **fields)
        return made[name]

    return pair


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | fields)


def dora(**fields: Any) -> Any:
    return lora(use_dora=True, **fields)


def gpt2(**fields: Any) -> Any:
    return lora(target_modules=["c_attn"], fan_in_fan_out=True, **fields)


BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bias all": ("tied", lambda: lora(bias="all")),
    "bias lora_only": ("tied", lambda: lora(bias="lora_only")),
    "bias all everywhere": (
        "biases",
        lambda: lora(bias="all", target_modules=["q_proj", "fc1", "lm_head", "embed_tokens"]),
    ),
    "bias all with modules": ("biases", lambda: lora(bias="all", modules_to_save=["lm_head", "layernorm"])),
    "bias all of Conv1D": ("gpt2", lambda: gpt2(bias="all")),
    "bias all DoRA": ("biases", lambda: dora(bias="all")),
    "bias lora_only DoRA": ("tied", lambda: dora(bias="lora_only")),
    "lora_bias": ("tied", lambda: lora(lora_bias=True, use_rslora=True)),
    "DoRA patterns": (
        "llama",
        lambda: dora(
            target_modules="all-linear",
            rank_pattern={"q_proj": 2, r".*\.1\.mlp\.down_proj": 6},
            alpha_pattern={"k_proj": 3},
            use_rslora=True,
        ),
    ),
    "DoRA on the embedding": ("llama", lambda: dora(target_modules=["embed_tokens", "q_proj"])),
    "DoRA on a tied embedding": ("tied", lambda: dora(target_modules=["embed_tokens", "q_proj"])),
    "DoRA with modules": ("llama", lambda: dora(modules_to_save=[*BOTH, "norm"])),
    "DoRA with tied modules": ("tied", lambda: dora(modules_to_save=BOTH)),
    "tied embedding whole": ("tied", lambda: lora(modules_to_save=["embed_tokens"])),
    "tied head whole": ("tied", lambda: lora(modules_to_save=["lm_head"])),
    "tied both whole": ("tied", lambda: lora(modules_to_save=BOTH)),
    "kept tied": ("tied", lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "kept tied, not tied": (
        "llama",
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "LoRA on a tied head": (
        "tied",
        lambda: lora(target_modules=["q_proj", "lm_head"], rank_pattern={"lm_head": 3}),
    ),
    "tokens": ("llama", lambda: lora(trainable_token_indices=[9, 4])),
    "tokens tied": ("tied", lambda: lora(trainable_token_indices=[9, 4])),
    "tokens of a scaled embedding": ("gemma2", lambda: lora(trainable_token_indices=[9, 4])),
    "tokens by name": (
        "llama",
        lambda: lora(trainable_token_indices={"embed_tokens": [4], "lm_head": [5, 6]}),
    ),
    "tokens by name tied": ("tied", lambda: lora(trainable_token_indices={name: [4, 9] for name in BOTH})),
    "tokens and head": ("llama", lambda: dora(modules_to_save=["lm_head"], trainable_token_indices=[4, 9])),
    "tokens of GPT-2": ("gpt2", lambda: gpt2(trainable_token_indices=[4, 9])),
    "IA3 with modules": (
        "tied",
        lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            modules_to_save=["lm_head"],
        ),
    ),
    "VeRA with modules": (
        "llama",
        lambda: peft.VeraConfig(
            task_type="CAUSAL_LM", r=8, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]
        ),
    ),
}
# the others are no change of weights: what is one matrix would become two, or a bias has no place
NOT_FUSED = {
    *("tied embedding whole", "tied head whole", "tied both whole", "kept tied", "LoRA on a tied head"),
    *("DoRA on a tied embedding", "DoRA with tied modules", "IA3 with modules"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_written_trained_and_fused(
    case: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    name, config = CASES[case]
    pair = pairs(name)
    expected = pair.made(config(), tmp_path / "peft")
    assert np.abs(expected - run(pair.base())).max() > 1e-2
    near = bound(expected)
    loaded = model.load(pair.mlx)
    exchange.import_adapter(tmp_path / "peft", tmp_path / "ours", loaded=loaded)
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded), expected, atol=near)
    exchange.export(tmp_path / "ours", tmp_path / "out", format="peft", base=str(pair.torch))
    again = peft.PeftModel.from_pretrained(pair.base(), tmp_path / "out").eval()
    np.testing.assert_allclose(run(again), expected, atol=near)
    alone = load_adapter(pair.base(), tmp_path / "out")
    np.testing.assert_allclose(run(alone), expected, atol=near)
    if case in NOT_FUSED:
        with pytest.raises(ConfigError, match=r"tied|one matrix"):
            fuse.fuse(pair.mlx, tmp_path / "ours", tmp_path / "fused")
    else:
        fused = fuse.fuse(pair.mlx, tmp_path / "ours", tmp_path / "fused")
        assert fused.error <= near
    every_array_trains(loaded)


def every_array_trains(loaded: Any) -> None:
    before = dict(tree_flatten(loaded.model.trainable_parameters()))
    config = TrainConfig(steps=1, batch_size=2, lr=1e-2, warmup=0)
    assert [*Run(loaded.model, [Example(row, 1) for row in IDS.tolist()], config=config)]
    after = dict(tree_flatten(loaded.model.trainable_parameters()))
    still = [path for path, array in before.items() if mx.array_equal(array, after[path])]
    assert not still


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "both of a tied pair": ("tied", lambda: lora(target_modules=BOTH), "changes of both"),
    "DoRA on a tied head": ("tied", lambda: dora(target_modules=["q_proj", "lm_head"]), "head alone"),
    "tokens of a tied head": ("tied", lambda: lora(trainable_token_indices={"lm_head": [4]}), "head alone"),
    "tokens of a head with a bias": (  # PEFT leaves the bias out
        "biases",
        lambda: lora(trainable_token_indices={"lm_head": [4]}),
        "nor a head without bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_a_line(
    case: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    name, config, said = REFUSED[case]
    pair = pairs(name)
    pair.made(config(), tmp_path / "peft")
    with pytest.raises(AdaptersError, match=said) as error:
        adapter.load(model.load(pair.mlx), tmp_path / "peft")
    assert "\n" not in str(error.value)


def test_a_bias_without_a_place_is_not_fused(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("llama")
    pair.made(lora(lora_bias=True), tmp_path / "peft")
    with pytest.raises(ConfigError, match="which the base has no place for"):
        fuse.fuse(pair.mlx, tmp_path / "peft", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("method", ["series", "parallel"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_bottlenecks_with_modules_come_back(
    method: str, name: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    """PEFT has no bottlenecks: torch alone opens the folder."""
    from trained import make_adapter

    pair, fields = pairs(name), {"bottleneck_size": 4, "modules_to_save": "lm_head,norm"}
    make_adapter(pair.mlx, tmp_path / "a", method, fields, seed=0)
    loaded = model.load(pair.mlx)
    adapter.load(loaded, tmp_path / "a")
    loaded.model.eval()
    expected = logits(loaded)
    theirs = run(load_adapter(pair.base(), tmp_path / "a"))
    np.testing.assert_allclose(theirs, expected, atol=bound(expected))
    if name == "tied":  # which LLM-Adapters does not know
        return
    exchange.export(tmp_path / "a", tmp_path / "x", format="llm-adapters", base="owner/base")
    again = model.load(pair.mlx)
    exchange.import_adapter(tmp_path / "x", tmp_path / "b", loaded=again)
    again.model.eval()
    np.testing.assert_allclose(logits(again), expected, atol=1e-6)
