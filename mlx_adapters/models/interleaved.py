"""gpt-oss's experts as a checkpoint in bfloat16 has them: [experts, in, out], rows of gate and up in turns.

mlx-lm's model file reads the published checkpoint, whose matrices are MXFP4 blocks [experts, out, in]; those
of a fine-tuned model, which transformers writes unquantized, it cuts along the wrong axis.
"""

import mlx.core as mx

__all__ = ["stacks"]


def stacks(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of a checkpoint with unquantized experts under the names of mlx-lm's modules; others as
    they are."""
    if not any(name.endswith("experts.gate_up_proj") for name in weights):
        return weights
    named: dict[str, mx.array] = {}
    for name, array in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            named[f"{stem}.gate_proj.weight"] = array[..., ::2].swapaxes(-1, -2)
            named[f"{stem}.up_proj.weight"] = array[..., 1::2].swapaxes(-1, -2)
        elif last == "gate_up_proj_bias":
            named[f"{stem}.gate_proj.bias"] = array[..., ::2]
            named[f"{stem}.up_proj.bias"] = array[..., 1::2]
        elif last == "down_proj" and stem.endswith("experts"):
            named[f"{stem}.down_proj.weight"] = array.swapaxes(-1, -2)
        elif last == "down_proj_bias":
            named[f"{stem}.down_proj.bias"] = array
        else:
            named[name] = array
    return named
