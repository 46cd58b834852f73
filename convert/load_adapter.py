"""Attach an adapter of mlx-adapters to a Hugging Face model. Needs torch, safetensors and transformers only.

    from transformers import AutoModelForCausalLM
    from load_adapter import load_adapter

    model = load_adapter(AutoModelForCausalLM.from_pretrained("BASE"), "THIS/FOLDER")
    model(input_ids).logits
    model.generate(input_ids, max_new_tokens=20)

Methods on layers become forward hooks: the model keeps its class and its weights. Methods on the prompt
return a small wrapper with `forward` and `generate`, whose logits and tokens are those of the text alone.

This file is part of mlx-adapters (Apache-2.0) and stands alone: copy it where you need it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache
from transformers.activations import ACT2FN

__all__ = ["load_adapter"]

PREFIX = "base_model.model."


def load_adapter(model: Any, folder: Any) -> Any:
    """`model` with the adapter in `folder`; ValueError where a tensor or a method finds no place."""
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    ours = folder / "mlx_adapters.json"
    config["ours"] = json.loads(ours.read_text())["config"] if ours.exists() else {}
    tensors = load_file(folder / "adapter_model.safetensors")
    kind = config["peft_type"]
    if kind in ("PROMPT_TUNING", "P_TUNING"):
        return WithPrompt(model, tensors["prompt_embeddings"])
    if kind == "PREFIX_TUNING":
        return WithPrefix(model, tensors["prompt_embeddings"], config)
    if kind not in ON_LAYERS:
        raise ValueError(f"{folder}: peft_type {kind!r} is unknown. Known: {', '.join(ON_LAYERS)}")
    modules = dict(model.named_modules())
    shared = {name: tensors.pop(name) for name in list(tensors) if name.startswith("base_model.vera_")}
    for path, own in grouped(tensors, modules).items():
        ON_LAYERS[kind](modules, path, {**own, **shared}, config)
    return model


def grouped(tensors: dict[str, Any], modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """{path of a layer: {the rest of the name: tensor}}; the longest path that is a layer counts."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(PREFIX).split(".")
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in modules), None)
        if path is None or not name.startswith(PREFIX):
            raise ValueError(f"{name}: the model has no such layer, so the adapter is another model's")
        found.setdefault(path, {})[".".join(parts[path.count(".") + 1 :])] = tensor
    return found


# On layers: y = what the layer returns, x = what it is given -----------------------------------------------


def lora(modules: Any, path: str, own: Any, config: Any) -> None:
    """y + scale B A x;  DoRA: y + (g - 1) W x + g scale B A x with g = m / ||W + scale B A||."""
    layer, gain = modules[path], None
    if "weight" in own:  # trained whole
        layer.weight.data = own["weight"].to(layer.weight)
        if "bias" in own:
            layer.bias.data = own["bias"].to(layer.bias)
        return
    embeds = "lora_embedding_A" in own
    a, b = (own[f"lora_embedding_{n}"] if embeds else own[f"lora_{n}.weight"] for n in ("A", "B"))
    rank = a.shape[0]
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((v for k, v in patterns if re.match(rf"(.*\.)?({k})$", path)), config["lora_alpha"])
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    if embeds:
        layer.register_forward_hook(
            lambda module, given, y: y + scale * like(y, a).T[given[0]] @ like(y, b).T
        )
        return
    if config.get("use_dora"):
        magnitude = own.get("lora_magnitude_vector.weight", own.get("lora_magnitude_vector"))
        v = rows(layer).float() + scale * (b @ a)
        gain = magnitude / v.norm(dim=1)

    def hook(module: Any, given: Any, y: Any) -> Any:
        update = like(y, scale * (given[0] @ like(given[0], a).T) @ like(given[0], b).T)
        if gain is None:
            return y + update
        plain = y if getattr(module, "bias", None) is None else y - module.bias
        return y + (like(y, gain) - 1) * plain + like(y, gain) * update

    layer.register_forward_hook(hook)


def ia3(modules: Any, path: str, own: Any, config: Any) -> None:
    """l * y, or W (l * x) on the layers out of the MLP."""
    scale = own["ia3_l"]
    if scale.shape[0] == 1:
        modules[path].register_forward_pre_hook(lambda module, given: (given[0] * like(given[0], scale[0]),))
    else:
        modules[path].register_forward_hook(lambda module, given, y: y * like(y, scale[:, 0]))


def vera(modules: Any, path: str, own: Any, config: Any) -> None:
    """y + b * B (d * A x), A and B cut to the layer's size."""
    d, b = own["vera_lambda_d"], own["vera_lambda_b"]
    first, second = own["base_model.vera_A"], own["base_model.vera_B"][: b.shape[0]]

    def hook(module: Any, given: Any, y: Any) -> Any:
        x = given[0]
        low = (x @ like(x, first)[:, : x.shape[-1]].T) * like(x, d)
        return y + like(y, (low @ like(x, second).T) * like(x, b))

    modules[path].register_forward_hook(hook)


def norms(modules: Any, path: str, own: Any, config: Any) -> None:
    """The norm's own weight, and bias where it has one."""
    for name in ("weight", "bias"):
        if f"ln_tuning_layers.{name}" in own:
            held = getattr(modules[path], name)
            held.data = own[f"ln_tuning_layers.{name}"].to(held)


OUT_OF = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "fc_out")


def bottleneck(modules: Any, path: str, own: Any, config: Any) -> None:
    """f(x) = s up(act(down(x))):  W (x + f(x)), y + f(y) or y + f(x), by the layer's side."""
    down, up = own["adapter_down.weight"], own["adapter_up.weight"]
    scaling = own.get("adapter_scaling", config["scaling"])
    act = ACT2FN[config["non_linearity"]]

    def f(x: Any) -> Any:
        scale = like(x, scaling) if isinstance(scaling, torch.Tensor) else scaling
        return scale * (act(x @ like(x, down).T) @ like(x, up).T)

    side = config["ours"].get("side", "auto")
    if side == "auto":
        side = "post" if path.rpartition(".")[2] in OUT_OF else "pre"
    if config.get("use_parallel_adapter"):
        modules[path].register_forward_hook(lambda module, given, y: y + f(given[0]))
    elif side == "post":
        modules[path].register_forward_hook(lambda module, given, y: y + f(y))
    else:
        modules[path].register_forward_pre_hook(lambda module, given: (given[0] + f(given[0]),))


NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "final_layer_norm", "ln_2")


def block(modules: Any, path: str, own: Any, config: Any) -> None:
    """s + f(s), s + f(h + s) or s + f(h): h is what the block's norm before the MLP is given."""
    down, down_bias = own["adapter_down.0.weight"], own["adapter_down.0.bias"]
    up, up_bias = own["adapter_up.weight"], own["adapter_up.bias"]
    scaling, act = own.get("scaling", config["scaling"]), ACT2FN[config["non_linearity"]]
    seen: dict[str, Any] = {}
    name = config["adapter"]
    if name != "double_seq_bn":
        watch(modules, path, seen)

    def hook(module: Any, given: Any, s: Any) -> Any:
        h = sum(seen.values())
        x = s if name == "double_seq_bn" else h + s if name == "seq_bn" else h
        scale = like(x, scaling) if isinstance(scaling, torch.Tensor) else scaling
        inner = act(x @ like(x, down).T + like(x, down_bias))
        return s + scale * (inner @ like(x, up).T + like(x, up_bias))

    modules[path].register_forward_hook(hook)


def watch(modules: Any, path: str, seen: dict[str, Any]) -> None:
    """Keep in `seen` the residual stream that enters the MLP of the block that `path` lies in."""
    parts = path.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    prefix = ".".join(parts[: number + 1]) + "."
    norm = next((prefix + n for n in NORMS if prefix + n in modules), None)
    if norm is not None:
        modules[norm].register_forward_pre_hook(lambda module, given: seen.update(h=given[0]))
    elif prefix + "ln_1" in modules:  # GPT-J: one norm, and the stream with attention added
        modules[prefix + "ln_1"].register_forward_pre_hook(lambda m, given: seen.update(h=given[0]))
        out = modules[prefix + "attn.out_proj"]
        out.register_forward_hook(lambda m, given, y: seen.update(attention=y))


ON_LAYERS = {
    "LORA": lora,
    "IA3": ia3,
    "VERA": vera,
    "LN_TUNING": norms,
    "BOTTLENECK": bottleneck,
    "ADAPTERHUB": block,
}


def rows(layer: Any) -> Any:
    """The weight [out, in]; GPT-2's Conv1D keeps it transposed."""
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


def like(x: Any, tensor: Any) -> Any:
    """`tensor` on the device and in the precision of `x`."""
    return tensor.to(device=x.device, dtype=x.dtype)


# On the prompt: n virtual tokens in front, the text stands at position n -----------------------------------


class WithPrompt(nn.Module):
    """Embeddings in front of those of the text."""

    def __init__(self, model: Any, table: Any) -> None:
        super().__init__()
        self.model, self.table = model, nn.Parameter(table)

    def _inputs(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        words = self.model.get_input_embeddings()(input_ids)
        front = like(words, self.table).expand(len(words), -1, -1)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(len(words), front.shape[1]), mask], dim=1)
        return {"inputs_embeds": torch.cat([front, words], dim=1), "attention_mask": mask}

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        out = self.model(**self._inputs(input_ids, attention_mask), **more)
        out.logits = out.logits[:, len(self.table) :]
        return out

    def generate(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        """The text and what follows it."""
        return torch.cat(
            [input_ids, self.model.generate(**self._inputs(input_ids, attention_mask), **more)], dim=1
        )


class WithPrefix(nn.Module):
    """A cache that starts with learned keys and values."""

    def __init__(self, model: Any, table: Any, config: Any) -> None:
        super().__init__()
        self.model, self.table, self.heads = model, nn.Parameter(table), config["num_attention_heads"]
        self.layers = config["num_layers"]

    def _inputs(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        n = len(self.table)
        states = self.table.to(self.model.device, self.model.dtype).view(n, self.layers, 2, self.heads, -1)
        cache = DynamicCache()
        for layer in range(self.layers):
            key, value = (
                states[:, layer, which].permute(1, 0, 2).expand(len(input_ids), -1, -1, -1)
                for which in (0, 1)
            )
            cache.update(key.contiguous(), value.contiguous(), layer)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {
            "past_key_values": cache,
            "attention_mask": torch.cat([mask.new_ones(len(input_ids), n), mask], dim=1),
        }

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        return self.model(input_ids=input_ids, **self._inputs(input_ids, attention_mask), **more)

    def generate(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        """The text and what follows it."""
        # generate() skips as many tokens as the cache holds: stand-ins for the virtual ones
        front = input_ids.new_zeros(len(input_ids), len(self.table))
        given = torch.cat([front, input_ids], dim=1)
        return self.model.generate(given, **self._inputs(input_ids, attention_mask), **more)[
            :, front.shape[1] :
        ]
