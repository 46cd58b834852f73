"""Random LoRA configurations of PEFT's, seeded: each gives PEFT's own logits, or is refused in one line."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import IDS, bound, logits
from tiny import make_tiny

from mlx_adapters import adapter
from mlx_adapters.convert import exchange
from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.errors import AdaptersError
from mlx_adapters.models import load as model

peft = pytest.importorskip("peft")
KINDS = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "phi": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True},
}
SHORT, COUNT = 6, 40
# what may be refused, and nothing else
KNOWN = (
    "changes of both, each its own",
    "an adapter of the head alone is not read",
    "of the head alone, which is the embedding here",
    "nor a head without bias",
    "layer_replication",
    "alora_invocation_tokens",
)


def config(draw: random.Random, linears: list[str]) -> dict[str, Any]:
    """The fields of one configuration."""
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": draw.choice([1, 2, 5, 8])}
    fields["lora_alpha"] = draw.choice([1, 4, 12, 16])
    fields["target_modules"] = draw.choice(
        [
            "all-linear",
            draw.sample(linears, 2),
            draw.sample([*linears, "embed_tokens", "lm_head"], 3),
            rf".*\.1\..*({'|'.join(draw.sample(linears, 2))})",
        ]
    )
    options: list[tuple[str, Any]] = [
        ("use_rslora", True),
        ("use_dora", True),
        ("bias", draw.choice(["all", "lora_only"])),
        ("lora_bias", True),
        ("rank_pattern", {linears[0]: 3, rf".*\.0\..*{linears[1]}": 4}),
        ("alpha_pattern", {linears[1]: 7}),
        ("modules_to_save", draw.sample(["embed_tokens", "lm_head", "norm"], draw.choice([1, 2]))),
        ("trainable_token_indices", draw.choice([[3, 9], {"embed_tokens": [5]}, {"lm_head": [5, 6]}])),
        ("layers_to_transform", draw.choice([0, [1], [0, 1]])),
        ("exclude_modules", [linears[2]]),
        ("init_lora_weights", draw.choice([False, "gaussian", "orthogonal"])),
        ("ensure_weight_tying", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [4, 5]),
        ("lora_dropout", 0.1),
    ]
    fields |= dict(draw.sample(options, draw.choice([1, 2, 3])))
    if isinstance(fields["target_modules"], str):
        fields.pop("layers_to_transform", None)
    return fields


def made(folder: Path, fields: dict[str, Any], place: Path) -> np.ndarray | None:
    """PEFT's logits, its adapter saved in `place` and opened by it again; None where PEFT does not make it or
    does not open its own."""
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    ids = torch.tensor(IDS.tolist())
    try:
        network = peft.get_peft_model(base().eval(), peft.LoraConfig(**fields)).eval()
        torch.manual_seed(len(str(fields)))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
            network.save_pretrained(place)
            again = peft.PeftModel.from_pretrained(base().eval(), place).eval()
            return again(ids).logits.numpy()  # type: ignore[no-any-return]
    except Exception:  # whatever PEFT raises for a configuration that it cannot make or open
        return None


def sweep(arch: str, count: int, root: Path) -> dict[str, int]:
    torch_folder = make_tiny(arch, root, **KINDS[arch])
    convert(str(torch_folder), root / "mlx")
    linears = ["q_proj", "k_proj", "v_proj", "fc1" if arch == "phi" else "up_proj"]
    counts = {"equal": 0, "refused": 0, "not made": 0}
    for seed in range(count):
        fields, place = config(random.Random(f"{arch} {seed}"), linears), root / str(seed)
        expected = made(torch_folder, fields, place / "peft")
        if expected is None:
            counts["not made"] += 1
            continue
        loaded = model.load(root / "mlx")
        try:
            exchange.import_adapter(place / "peft", place / "ours", loaded=loaded)
        except AdaptersError as error:
            said = str(error)
            assert "\n" not in said
            assert any(words in said for words in KNOWN), (fields, said)
            counts["refused"] += 1
            print(seed, said[-120:])
            continue
        loaded.model.eval()
        np.testing.assert_allclose(logits(loaded), expected, atol=bound(expected), err_msg=str(fields))
        # and what was written is the same to PEFT
        exchange.export(place / "ours", place / "out", format="peft", base=str(torch_folder))
        before, after = (adapter.read_tensors(place / name) for name in ("ours", "out"))
        assert before.keys() == after.keys()
        back = made_again(torch_folder, place / "out")
        np.testing.assert_allclose(back, expected, atol=bound(expected), err_msg=str(fields))
        counts["equal"] += 1
    return counts


def made_again(folder: Path, place: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        network = peft.PeftModel.from_pretrained(base.eval(), place).eval()
        return network(torch.tensor(IDS.tolist())).logits.numpy()  # type: ignore[no-any-return]


def test_a_few_random_configurations(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says much of what it is asked for here
        counts = sweep("qwen2", SHORT, tmp_path)
    assert counts["equal"] >= SHORT // 3, counts


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
def test_random_configurations(arch: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = sweep(arch, COUNT, tmp_path)
    print(arch, counts)
    assert counts["equal"] >= COUNT // 3, counts
