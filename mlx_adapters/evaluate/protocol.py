"""Protocols: how sets are asked and answers are read, under one name.

| | decoding | beams | template | longest answer | reading |
|---|---|---|---|---|---|
| paper | beam | 4 | llm-adapters | the set's (256 tokens, 32 for single words) | the paper's rule |

LLM-Adapters sets temperature, top_p and top_k too, but leaves sampling off, so they change nothing.
"""

from typing import Any

from mlx_adapters.errors import ConfigError, unknown

__all__ = ["DEFAULTS", "PROTOCOLS", "chosen"]

DEFAULTS: dict[str, Any] = {"decoding": "greedy", "num_beams": 4, "reading": "strict"}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {
        "decoding": "beam",
        "num_beams": 4,
        "template": "llm-adapters",
        "max_tokens": None,  # each set's own
        "reading": "paper",
    }
}


def chosen(protocol: str | None, options: dict[str, Any], *, flag: str = "") -> dict[str, Any]:
    """`options` (None: not set) completed by the protocol, or by the defaults.

    Raises ConfigError for an unknown protocol, and for a value that contradicts it; `flag` precedes a name in
    the message, "--" on the command line.
    """
    if protocol is None:
        return DEFAULTS | {name: value for name, value in options.items() if value is not None}
    if protocol not in PROTOCOLS:
        raise ConfigError(unknown("protocol", protocol, PROTOCOLS))
    fixed = PROTOCOLS[protocol]
    for name, value in options.items():
        if name in fixed and value is not None and value != fixed[name]:
            spelled = f"{flag}{name.replace('_', '-') if flag else name}"
            wanted = "each set's own limit" if fixed[name] is None else fixed[name]
            raise ConfigError(
                f"{spelled} {value} contradicts {flag}protocol {protocol}, which uses {wanted}: leave one of "
                "the two out"
            )
    return options | fixed
