"""Attach an adapter of mlx-adapters to a Hugging Face model. Needs torch, safetensors and transformers only.

    from transformers import AutoModelForCausalLM
    from load_adapter import load_adapter

    model = load_adapter(AutoModelForCausalLM.from_pretrained("BASE"), "THIS/FOLDER")
    model(input_ids).logits
    model.generate(input_ids, max_new_tokens=20)

Methods on layers become forward hooks: the model keeps its class and its weights. Methods on the prompt
return a small wrapper with `forward` and `generate`, whose logits and tokens are those of the text alone.
Adapters compute in float32, whatever the model's precision is.

This file is part of mlx-adapters (Apache-2.0) and stands alone: copy it where you need it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

__all__ = ["load_adapter"]

PREFIX = "base_model.model."


def load_adapter(model: Any, folder: Any) -> Any:
    """`model` with the adapter in `folder`; ValueError where a tensor or a method finds no place."""
    config, tensors = read(Path(folder))
    if config["peft_type"] in ("PROMPT_TUNING", "P_TUNING"):
        return WithPrompt(model, tensors["prompt_embeddings"])
    if config["peft_type"] == "PREFIX_TUNING":
        return WithPrefix(model, tensors["prompt_embeddings"], config)
    for layer, (kind, change) in changes(model, Path(folder)).items():
        if kind == "input":
            layer.register_forward_pre_hook(lambda m, given, f=change: (f(given[0]), *given[1:]))
        else:
            layer.register_forward_hook(lambda m, given, y, f=change: f(given[0] if given else None, y))
    return model


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the folder says of the adapter, its tensors)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    ours = folder / "mlx_adapters.json"
    config["ours"] = json.loads(ours.read_text())["config"] if ours.exists() else {}
    return config, load_file(folder / "adapter_model.safetensors")


def changes(model: Any, folder: Path) -> dict[nn.Module, tuple[str, Any]]:
    """{layer: ("input", f) for layer(f(x)), or ("output", f) for f(x, layer(x))}."""
    config, tensors = read(folder)
    kind = config["peft_type"]
    modules = dict(model.named_modules())
    if kind == "ADAPTER_FUSION":
        return fusion(model, folder, grouped(tensors, modules))
    if kind not in ON_LAYERS:
        raise ValueError(f"{folder}: peft_type {kind!r} is unknown. Known: {', '.join(ON_LAYERS)}")
    shared = {name: tensors.pop(name) for name in list(tensors) if name.startswith("base_model.vera_")}
    own = grouped(tensors, modules)
    for path in own if kind not in ("LN_TUNING", "LOREFT") else ():
        itself = own[path].keys() <= {"weight", "bias"}
        if not isinstance(modules[path], (nn.Linear, nn.Embedding, Conv1D)) and not itself:
            what = type(modules[path]).__name__
            raise ValueError(f"{path}: is a {what}, no linear layer. PeftModel.from_pretrained may open it")
    return {
        modules[path]: on_layer(kind, tensors)(modules, path, {**tensors, **shared}, config)
        for path, tensors in own.items()
    }


def on_layer(kind: str, own: dict[str, Any]) -> Any:
    """What makes the change of a layer with these tensors."""
    if own.keys() <= {"weight", "bias"}:
        return trained
    return tokens if "token_adapter.trainable_tokens_delta" in own else ON_LAYERS[kind]


def grouped(tensors: dict[str, Any], modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """{path of a layer: {the rest of the name: tensor}}; the longest path that is a layer counts."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(PREFIX).split(".")
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in modules), None)
        if path is None or not name.startswith(PREFIX):
            raise ValueError(f"{name}: the model has no such layer, so the adapter is another model's")
        found.setdefault(path, {})[".".join(parts[path.count(".") + 1 :])] = tensor.float()
    return found


# On layers: y = what the layer returns, x = what it is given -----------------------------------------------


def lora(modules: Any, path: str, own: Any, config: Any) -> Any:
    """y + scale B A x;  DoRA: y + (g - 1) W x + g scale B A x with g = m / ||W + scale B A||."""
    layer = modules[path]
    if "base_layer.bias" in own:
        set_bias(layer, own["base_layer.bias"])
    embeds = "lora_embedding_A" in own
    a, b = (own[f"lora_embedding_{n}"] if embeds else own[f"lora_{n}.weight"] for n in ("A", "B"))
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((v for k, v in patterns if re.match(rf"(.*\.)?({k})$", path)), config["lora_alpha"])
    scale = alpha / len(a) ** 0.5 if config.get("use_rslora") else alpha / len(a)
    if embeds and not config.get("use_dora"):
        return "output", lambda x, y: y + (scale * on(y, a).T[x] @ on(y, b).T).to(y.dtype)
    if not config.get("use_dora"):
        more = scale * own.get("lora_B.bias", torch.zeros(len(b)))
        return (
            "output",
            lambda x, y: y + (scale * (x.float() @ on(x, a).T) @ on(x, b).T + on(x, more)).to(y.dtype),
        )
    magnitude = own.get("lora_magnitude_vector.weight", own.get("lora_magnitude_vector"))
    if embeds:
        table = layer.weight.float() + scale * on(layer.weight, b @ a).T
        length = on(table, magnitude) / table.norm(dim=0)
        return "output", lambda x, y: y + (on(y, length) * on(y, table)[x] - y).to(y.dtype)
    v = rows(layer).float() + scale * (on(layer.weight, b) @ on(layer.weight, a))
    gain = on(v, magnitude) / v.norm(dim=1)

    def dora(x: Any, y: Any) -> Any:
        plain = y if getattr(layer, "bias", None) is None else y - layer.bias
        update = scale * (x.float() @ on(x, a).T) @ on(x, b).T
        return y + ((on(y, gain) - 1) * plain + on(y, gain) * update).to(y.dtype)

    return "output", dora


def trained(modules: Any, path: str, own: Any, config: Any) -> Any:
    """The layer's own weight and bias, or its bias alone."""
    layer = modules[path]
    if "weight" not in own:
        set_bias(layer, own["bias"])
        return "output", lambda x, y: y
    if not isinstance(layer, (nn.Linear, nn.Embedding, Conv1D)):
        return norm(modules, path, {f"ln_tuning_layers.{name}": own[name] for name in own}, config)
    return "output", lambda x, y: whole(layer, on(y, own["weight"]), on(y, own.get("bias")), x).to(y.dtype)


def set_bias(layer: Any, bias: Any) -> None:
    """Another bias."""
    layer.bias.data = bias.to(layer.bias)


def tokens(modules: Any, path: str, own: Any, config: Any) -> Any:
    """Other rows for some tokens; a tied output head has them too."""
    layer, which = modules[path], config["trainable_token_indices"]
    if isinstance(which, dict):
        which = next(ids for name, ids in which.items() if path.endswith(name))
    layer.weight.data[which] = own["token_adapter.trainable_tokens_delta"].to(layer.weight)
    return "output", lambda x, y: y


def whole(layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    """What the layer returns with another weight."""
    if isinstance(layer, nn.Embedding):
        return functional.embedding(x, weight)
    return functional.linear(x.float(), weight, bias)


def ia3(modules: Any, path: str, own: Any, config: Any) -> Any:
    """l * y, or W (l * x) on the layers out of the MLP."""
    scale = own["ia3_l"]
    if scale.shape[0] == 1:
        return "input", lambda x: (x * on(x, scale[0])).to(x.dtype)
    return "output", lambda x, y: (y * on(y, scale[:, 0])).to(y.dtype)


def vera(modules: Any, path: str, own: Any, config: Any) -> Any:
    """y + b * B (d * A x), A and B cut to the layer's size."""
    d, b = own["vera_lambda_d"], own["vera_lambda_b"]
    first, second = own["base_model.vera_A"], own["base_model.vera_B"][: len(b)]

    def change(x: Any, y: Any) -> Any:
        low = (x.float() @ on(x, first)[:, : x.shape[-1]].T) * on(x, d)
        return y + ((low @ on(x, second).T) * on(x, b)).to(y.dtype)

    return "output", change


def norm(modules: Any, path: str, own: Any, config: Any) -> Any:
    """The norm's own weight, and bias where it has one."""
    for name in ("weight", "bias"):
        if f"ln_tuning_layers.{name}" in own:
            held = getattr(modules[path], name)
            held.data = own[f"ln_tuning_layers.{name}"].to(held)
    return "output", lambda x, y: y


def loreft(modules: Any, path: str, own: Any, config: Any) -> Any:
    """h + R^T (W h + b - R h); R is Q of a QR decomposition whose diagonal is positive."""
    q, r = torch.linalg.qr(own["rotate_layer.weight"].T)
    rotate = (q * r.diagonal().sign()).T
    source, bias = own["learned_source.weight"] - rotate, own["learned_source.bias"]

    def change(x: Any, y: Any) -> Any:
        h = y[0] if isinstance(y, tuple) else y
        edited = h + (functional.linear(h.float(), on(h, source), on(h, bias)) @ on(h, rotate)).to(h.dtype)
        return (edited, *y[1:]) if isinstance(y, tuple) else edited

    return "output", change


def small(own: Any, config: Any) -> Any:
    """f(x) = s up(act(down(x))), with the biases it has."""
    own = {name.replace("adapter_down.0", "adapter_down"): tensor for name, tensor in own.items()}
    act, learned = ACT2FN[config["non_linearity"]], own.get("adapter_scaling", own.get("scaling"))

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, on(x, own[f"{name}.weight"]), on(x, own.get(f"{name}.bias")))

    def f(x: Any) -> Any:
        scale = config["scaling"] if learned is None else on(x, learned)
        return scale * linear(act(linear(x.float(), "adapter_down")), "adapter_up")

    return f


# the last layers of attention and of the MLP
OUT_OF = r"o_proj|out_proj|o_b_proj|dense|wo|c_proj|linear_out|down_proj|fc2|fc_out|dense_4h_to_h|w2"


def bottleneck(modules: Any, path: str, own: Any, config: Any) -> Any:
    """W (x + f(x)), y + f(y) or y + f(x), by the layer's side."""
    f, side = small(own, config), config["ours"].get("side", "auto")
    if config.get("use_parallel_adapter"):
        return "output", lambda x, y: y + f(x).to(y.dtype)
    if side == "auto":
        side = "post" if re.fullmatch(OUT_OF, path.rpartition(".")[2]) else "pre"
    if side == "post":
        return "output", lambda x, y: y + f(y).to(y.dtype)
    return "input", lambda x: x + f(x).to(x.dtype)


def block(modules: Any, path: str, own: Any, config: Any) -> Any:
    """s + f(s), s + f(h + s) or s + f(h): h is what the block's norm before the MLP is given."""
    f, form = small(own, config), config["adapter"]
    if form == "double_seq_bn":
        return "output", lambda x, s: s + f(s).to(s.dtype)
    seen: dict[str, Any] = {}
    watch(modules, path, seen)

    def change(x: Any, s: Any) -> Any:
        h = sum(seen.values())
        return s + f(h + s if form == "seq_bn" else h).to(s.dtype)

    return "output", change


NORMS = (
    *("pre_feedforward_layernorm", "pre_ff_layernorm", "pre_mlp_layernorm", "pre_mlp_norm", "ffn_norm"),
    *("feedforward_layernorm", "channel_pre_norm", "post_attention_layernorm", "final_layer_norm", "ln_2"),
)


def watch(modules: Any, path: str, seen: dict[str, Any]) -> None:
    """Keep in `seen` the residual stream that enters the MLP of the block that `path` lies in."""
    found = re.match(r".*?\.\d+\.", path)
    prefix, kind = found.group() if found else "", modules[""].config.model_type
    name = next((prefix + n for n in NORMS if prefix + n in modules), None)
    if kind == "gptj":  # one norm, and the stream with attention added
        name = prefix + "ln_1"
        out = modules[prefix + "attn.out_proj"]
        out.register_forward_hook(lambda m, given, y: seen.update(attention=y))
    if name is not None:
        modules[name].register_forward_pre_hook(lambda m, given: seen.update(h=given[0]))
    elif kind != "phi":  # where f is given s alone
        raise ValueError(f"{path}: no norm before this MLP is known in a {kind} model")


ON_LAYERS = {"LORA": lora, "IA3": ia3, "VERA": vera, "LN_TUNING": norm, "BOTTLENECK": bottleneck}
ON_LAYERS |= {"ADAPTERHUB": block, "LOREFT": loreft}


def fusion(model: Any, folder: Path, own: dict[str, Any]) -> dict[nn.Module, tuple[str, Any]]:
    """h + V sum_n p_n z_n with z_n = adapter_n(x) - h, p = softmax of (Q h + b) . (K z_n)."""
    members = [changes(model, member) for member in sorted((folder / "members").glob("*/"))]
    names = {module: path for path, module in model.named_modules()}

    def fused(layer: Any, tensors: dict[str, Any]) -> Any:
        here = [member[layer] for member in members if layer in member]

        def change(x: Any, y: Any) -> Any:
            h = y.float()
            # forward() passes by the hooks: the layer itself
            made = [layer.forward(f(x)) if kind == "input" else f(x, h) for kind, f in here]
            z = torch.stack([one.float() - h for one in made], dim=-2)
            t = {name.removeprefix("fusion_"): on(x, tensor) for name, tensor in tensors.items()}
            if "key.weight" in t:
                u = functional.linear(h, t["query.weight"], t["query.bias"]) @ t["key.weight"]
                z = (z * u[..., None, :]).sum(-1).softmax(-1)[..., None] * z
            total = z.sum(-2)
            return (h + total + (total @ t["value.weight"].T if "value.weight" in t else 0)).to(y.dtype)

        return "output", change

    layers = dict.fromkeys(layer for member in members for layer in member)
    return {layer: fused(layer, own.get(names[layer], {})) for layer in layers}


def rows(layer: Any) -> Any:
    """The weight [out, in]; GPT-2's Conv1D keeps it transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def on(x: Any, tensor: Any) -> Any:
    """`tensor` on the device of `x`."""
    return None if tensor is None else tensor.to(x.device)


# On the prompt: n virtual tokens in front, the text stands at position n -----------------------------------


class WithPrompt(nn.Module):
    """Embeddings in front of those of the text."""

    def __init__(self, model: Any, table: Any) -> None:
        super().__init__()
        self.model, self.table = model, nn.Parameter(table)

    def inputs(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        """What the model is given."""
        words = self.model.get_input_embeddings()(input_ids)
        front = self.table.to(words).expand(len(words), -1, -1)
        return {
            "inputs_embeds": torch.cat([front, words], dim=1),
            "attention_mask": self.mask(input_ids, attention_mask),
        }

    def mask(self, input_ids: Any, attention_mask: Any) -> Any:
        """The attention mask, open for the virtual tokens."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return torch.cat([mask.new_ones(len(mask), len(self.table)), mask], dim=1)

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        out = self.model(**self.inputs(input_ids, attention_mask), **more)
        out.logits = out.logits[:, -input_ids.shape[1] :]
        return out

    def generate(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        """The text and what follows it."""
        made = self.model.generate(**self.inputs(input_ids, attention_mask), **more)
        return torch.cat([input_ids, made], dim=1)


class WithPrefix(WithPrompt):
    """A cache that starts with learned keys and values."""

    def __init__(self, model: Any, table: Any, config: Any) -> None:
        super().__init__(model, table)
        self.layers, self.heads = config["num_layers"], config["num_attention_heads"]

    def inputs(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        """What the model is given."""
        table = self.table.to(self.model.device, self.model.dtype)
        states = table.view(len(table), self.layers, 2, self.heads, -1).permute(1, 2, 3, 0, 4)
        cache = DynamicCache()
        for number, (key, value) in enumerate(states):
            rows = (part.repeat(len(input_ids), 1, 1, 1) for part in (key, value))
            cache.update(*rows, number)
        mask = self.mask(input_ids, attention_mask)
        return {"input_ids": input_ids, "past_key_values": cache, "attention_mask": mask}

    def generate(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        """The text and what follows it."""
        given = self.inputs(input_ids, attention_mask)
        # generate() skips as many tokens as the cache holds: stand-ins for the virtual ones
        front = input_ids.new_zeros(len(input_ids), len(self.table))
        given["input_ids"] = torch.cat([front, input_ids], dim=1)
        return self.model.generate(**given, **more)[:, front.shape[1] :]
