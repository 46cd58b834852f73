"""The base, its adapters and its answers, made once for the tests of the server and of its page."""

from pathlib import Path

import pytest
from serving import LONG, METHODS, PROMPTS, generated
from tiny import make_tiny
from trained import make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    folder = make_tiny("llama", root, max_position_embeddings=LONG)
    for method, fields in METHODS.items():
        make_adapter(folder, root / method, method, fields, seed=3)
    return folder


@pytest.fixture(scope="module")
def expected(base: Path) -> dict[tuple[str, str], str]:
    return {(name, text): generated(base, name, text) for name in (base.name, *METHODS) for text in PROMPTS}
