"""Where a claim of `family_trials` does not hold for a family: refused with these words, or known as wrong.

{family: {claim, or "every": words}}. `test_families.py` fails where an entry is missing, or no longer needed.
"""

__all__ = ["KNOWN", "REFUSED", "SOMETIMES", "exception"]

Exceptions = dict[str, dict[str, str]]

_LOST = "where a prefix would be lost"  # no cache of all keys and values: windows, states, convolutions
_SHAPES = "differ in shape"  # PEFT keeps a prefix's keys and values in one array
_STACKED = "its experts are stacked in SwitchLinear layers"  # no MLP outside them
_NO_TARGET = "has no linear layer that is a default target here"  # no MLP at all
_NO_DORA = "PEFT opens no dora on"  # experts and routers are parameters there, which take plain LoRA
_NOT_OPENED = "PEFT does not open it"
_NO_LORA = "PEFT opens no lora on"
_UNWRITTEN = "is written for transformers is not known here"
_LIGHTNING = "lightning attention"
_NO_ORIGIN = "what its weight is made of in the checkpoint is not known"  # experts that are single linears
_MAMBA = {"lora": _NO_LORA, "dora": _NO_DORA, "series": _NO_TARGET, "prefix": _LOST}

REFUSED: Exceptions = {
    "afmoe": {"dora": _NO_DORA, "prefix": _LOST},
    "cohere2": {"prefix": _LOST},
    "dbrx": dict.fromkeys(("lora", "four_bits", "fused", "dora", "series"), _NO_ORIGIN),
    "deepseek_v2": {"dora": _NO_DORA, "prefix": _SHAPES},
    "deepseek_v3": {"fused": _UNWRITTEN, "dora": _NO_DORA, "prefix": _SHAPES},
    "deepseek_v32": {"fused": _UNWRITTEN, "prefix": _LOST},
    "ernie4_5_moe": {"fused": "e_score_correction", "dora": _NO_DORA},
    "exaone4": {"prefix": _LOST},
    "exaone_moe": {"dora": _NO_DORA, "prefix": _LOST},
    "falcon_h1": {
        "lora": _NO_LORA,
        "fused": _UNWRITTEN,
        "dora": _NO_DORA,
        "series": "mlx-lm keeps its weight multiplied",
        "prefix": _LOST,
    },
    "falcon_mamba": _MAMBA,
    "gemma3": {"prefix": _LOST},
    "gemma3_text": {"prefix": _LOST},
    "gemma3n": {"prefix": _LOST},
    "gemma3n_text": {"prefix": _LOST},
    "gemma4": {"prefix": _LOST},
    "gemma4_text": {"prefix": _LOST},
    "gemma4_text:experts": {"dora": _NO_DORA, "ln_tuning": _NOT_OPENED, "prefix": _LOST},
    "glm4_moe": {"dora": _NO_DORA},
    "glm4_moe_lite": {"fused": _UNWRITTEN, "dora": _NO_DORA, "prefix": _SHAPES},
    "gpt_oss": {"dora": _NO_DORA, "series": _STACKED, "prefix": _LOST},
    "granitemoe": {"dora": _NO_DORA, "series": _STACKED},
    "granitemoehybrid": {"dora": _NO_DORA, "prefix": _LOST},
    "jamba": {"lora": _NO_LORA, "dora": _NO_DORA, "series": _STACKED, "prefix": _LOST},
    "lfm2": {"prefix": _LOST},
    "lfm2_moe": {"dora": _NO_DORA, "series": _STACKED, "prefix": _LOST},
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "minicpm3": {"prefix": _SHAPES},
    "minimax": {"every": _LIGHTNING},
    "minimax_m2": {"dora": _NO_DORA, "series": _STACKED},
    "mixtral": {"dora": _NO_DORA, "series": _STACKED},
    "nemotron_h": {"lora": _NO_LORA, "dora": _NO_DORA, "prefix": _LOST},
    "olmo3": {"prefix": _LOST},
    "olmo3:yarn": {"prefix": _LOST},
    "olmo_hybrid": {"prefix": _LOST},
    "olmoe": {"dora": _NO_DORA, "series": _STACKED},
    "phimoe": {"series": _STACKED},
    "qwen2_moe": {"dora": _NO_DORA},
    "qwen3_5": {"prefix": _LOST},
    "qwen3_5_moe": {"dora": _NOT_OPENED, "prefix": _LOST},
    "qwen3_5_moe_text": {"dora": _NOT_OPENED, "prefix": _LOST},
    "qwen3_5_text": {"prefix": _LOST},
    "qwen3_moe": {"dora": _NO_DORA, "series": _STACKED},
    "qwen3_moe:yarn": {"dora": _NO_DORA, "series": _STACKED},
    "qwen3_next": {"dora": _NO_DORA, "prefix": _LOST},
    "solar_open": {"dora": _NOT_OPENED},
}
"""Refused by an error of ours: these words are in it."""

KNOWN: Exceptions = {}
"""Wrong, or ends in an error that is not ours: what is seen. Nothing may stay here."""

SOMETIMES = {
    *(("phimoe", claim) for claim in ("dora", "four_bits")),
    *(("deepseek_v32", claim) for claim in ("dora", "four_bits", "ln_tuning")),
}
"""Claims that hold or not by the numbers drawn: a router that no other expert comes near has no gradient, and
an index that chooses tokens never has one."""


def exception(listed: Exceptions, family: str, claim: str) -> str | None:
    """The words for the claim in a list; None where it holds."""
    claims = listed.get(family, {})
    return claims.get(claim, claims.get("every"))
