"""Every bottleneck adapter in plain torch, on a transformers model, independent of the MLX layers.

The adapter's tensors become parameters that train; what they add enters by forward hooks. The residual stream
is not read from the norm in front of the MLP, as the MLX side does, but put together: what enters the block,
plus what its attention adds.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.activations import ACT2FN

__all__ = ["attach"]

PREFIX = "base_model.model."
# LLM-Adapters' table of linear layers by side, and the layers out of attention, which it does not have.
PRE = ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "fc_in", "fc1", "c_fc")
PRE_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
POST = ("down_proj", "dense_4h_to_h", "fc_out", "fc2", "c_proj", "o_proj", "out_proj", "dense")
# What a block adds to the residual stream before its MLP reads it: the module whose output that is.
ADDED_BY = {
    "gpt2": "attn.c_proj",
    "gptj": "attn.out_proj",
    "bloom": "self_attention.dense",
    "opt": "self_attn.out_proj",
    "gpt_neo": "attn.attention.out_proj",
    "gemma2": "post_attention_layernorm",
    "gpt_neox": None,  # its two sublayers read the same stream
}


def attach(model: Any, folder: Path) -> dict[str, nn.Parameter]:
    """Put the adapter in `folder` into `model`, freeze the rest, and return its tensors by name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    meta = folder / "mlx_adapters.json"
    side = json.loads(meta.read_text())["config"].get("side", "auto") if meta.exists() else "auto"
    named = {
        name: nn.Parameter(tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = dict(model.named_modules())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    used = set()
    for path, layer in modules.items():
        own = {name.removeprefix(f"{PREFIX}{path}."): t for name, t in named.items() if _is_in(name, path)}
        if not own:
            continue
        used |= {f"{PREFIX}{path}.{suffix}" for suffix in own}
        if config["peft_type"] == "BOTTLENECK":
            _on_linear(layer, path, own, config, side)
        else:
            _in_block(modules, path, own, config, model.config.model_type)
    assert used == set(named), f"no place for {sorted(set(named) - used)}"
    return named


def _is_in(name: str, path: str) -> bool:
    rest = name.removeprefix(f"{PREFIX}{path}.") if path else name
    return rest != name and rest.startswith(("adapter_", "scaling"))


def _f(own: dict[str, Any], config: dict[str, Any]) -> Any:
    """up(act(down(x))), scaled."""
    down = own.get("adapter_down.weight", own.get("adapter_down.0.weight"))
    scale = own.get("adapter_scaling", own.get("scaling", config["scaling"]))
    act = ACT2FN[config["non_linearity"]]

    def f(x: torch.Tensor) -> torch.Tensor:
        inner = act(nn.functional.linear(x, down, own.get("adapter_down.0.bias")))
        return scale * nn.functional.linear(inner, own["adapter_up.weight"], own.get("adapter_up.bias"))

    return f


def _on_linear(layer: Any, path: str, own: dict[str, Any], config: dict[str, Any], side: str) -> None:
    f, name = _f(own, config), path.rpartition(".")[2]
    assert name in (*PRE, *PRE_ATTENTION, *POST), f"{path}: on which side?"
    if config["use_parallel_adapter"]:
        layer.register_forward_hook(lambda module, given, z: z + f(given[0]))
    elif side == "post" or (side == "auto" and name in POST):
        layer.register_forward_hook(lambda module, given, z: z + f(z))
    else:
        layer.register_forward_pre_hook(lambda module, given: (given[0] + f(given[0]),))


def _in_block(
    modules: dict[str, Any], path: str, own: dict[str, Any], config: dict[str, Any], model_type: str
) -> None:
    parts = path.split(".")
    block = ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])
    stream: dict[str, torch.Tensor] = {}
    if config["adapter"] != "double_seq_bn" and model_type != "phi":  # AdapterHub gives Phi's no stream
        modules[block].register_forward_pre_hook(
            lambda module, args, kwargs: stream.update(entered=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        added = ADDED_BY.get(model_type, "self_attn.o_proj")
        if added is not None:
            modules[f"{block}.{added}"].register_forward_hook(
                lambda module, given, out: stream.update(attention=out)
            )
    f = _f(own, config)

    def after(module: Any, given: Any, s: torch.Tensor) -> torch.Tensor:
        h = sum(tensor.reshape(s.shape) for tensor in stream.values())
        if config["adapter"].endswith("par_bn"):
            return s + f(h)
        return s + f(h + s)  # without a stream h is 0: Houlsby's form, f(s)

    modules[path].register_forward_hook(after)
