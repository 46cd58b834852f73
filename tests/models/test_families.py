"""The models people adapt: every claim of `family_trials` on a tiny model of every family, against
transformers and PEFT.

A refusal is one line of ours and stands in `family_exceptions`, with its reason; so does a fault that is
known. Both fail here when they are no longer so.
"""

import pytest
from families import FAMILIES, WRAPPERS
from family_exceptions import KNOWN, REFUSED, SOMETIMES, exception
from family_trials import CLAIMS, Family

from mlx_adapters.errors import AdaptersError

# One of each kind: all keys and values, linear attention in a wrapper, experts, convolutions.
SAMPLE = ("llama", "qwen3_5", "gpt_oss", "lfm2")
NAMES = (*FAMILIES, *WRAPPERS)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The family of the parameter; made once for all of its claims."""
    return Family.make(request.param, tmp_path_factory.mktemp("family"))


def outcome(claim: str, family: Family) -> Exception | None:
    """What the claim raises."""
    try:
        CLAIMS[claim](family)
    except Exception as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")  # what transformers and PEFT say of their own fields and versions
@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in NAMES],
    indirect=True,
    ids=str,
    scope="module",
)
def test_a_claim_holds_or_is_refused_in_one_line(
    family: Family, claim: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["family"]
    refusal, fault = exception(REFUSED, name, claim), exception(KNOWN, name, claim)
    error = outcome(claim, family)
    if isinstance(error, AdaptersError):
        assert "\n" not in str(error), f"a refusal of several lines: {error}"
        assert refusal is not None, f"refused, and not in the list: {error}"
        assert refusal in str(error), f"refused, but for another reason: {error}"
    elif error is not None:
        if (name, claim) in SOMETIMES and "no gradient reaches" in str(error):
            pytest.xfail(str(error))
        assert fault is not None, f"not known to be wrong: {type(error).__name__}: {error}"
        pytest.xfail(fault)
    else:
        assert refusal is None, f"in the list of refusals, and no longer refused: {refusal}"
        assert fault is None, f"in the list of faults, and right: {fault}"


def test_every_exception_is_of_a_family_and_a_claim() -> None:
    for listed in (REFUSED, KNOWN):
        assert set(listed) <= set(NAMES)
        assert {claim for claims in listed.values() for claim in claims} <= {*CLAIMS, "every"}
