"""Where a claim of `family_trials` does not hold for a family: refused with these words, or known as wrong.

{family: {claim, or "every": words}}. `test_families.py` fails where an entry is missing, or no longer needed.
"""

__all__ = ["KNOWN", "REFUSED", "exception"]

Exceptions = dict[str, dict[str, str]]

REFUSED: Exceptions = {}
"""Refused by an error of ours: these words are in it."""

KNOWN: Exceptions = {}
"""Wrong, or crashes: what is seen. Nothing here may stay without an owner."""


def exception(listed: Exceptions, family: str, claim: str) -> str | None:
    """The words for the claim in a list; None where it holds."""
    claims = listed.get(family, {})
    return claims.get(claim, claims.get("every"))
