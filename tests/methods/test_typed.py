"""Methods are typed objects: what their classes say holds, and the library asks them by it."""

import ast
import dataclasses
import subprocess
import sys
from inspect import cleandoc
from pathlib import Path
from typing import Any

import pytest
import trials

import mlx_adapters
from mlx_adapters import methods
from mlx_adapters.errors import ConfigError
from mlx_adapters.methods.base import AdapterLayer, Method

SOURCE = Path(mlx_adapters.__file__).parent
CLASSES = [name for name in methods.__all__ if name[0].isupper() and name != "Method"]


def made(kind: type[Method]) -> Method:
    return kind(adapters="a,b") if kind.NAME == "fusion" else kind()  # type: ignore[call-arg]


def test_every_method_is_a_public_class() -> None:
    found = {getattr(methods, name).NAME: getattr(methods, name) for name in CLASSES}
    assert found == {name: methods.find(name) for name in methods.names()}
    assert methods.__all__ == sorted(methods.__all__)
    with pytest.raises(AttributeError, match="LoRa"):
        methods.LoRa  # noqa: B018


@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_what_it_is(name: str) -> None:
    kind = methods.find(name)
    head = " ".join(cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    assert head.startswith(f"{kind.TITLE}. {kind.AUTHORS}")
    assert kind.PAPER in head
    explained, _, options = (kind.__doc__ or "").partition("\n\nArgs:")
    assert kind.explanation() == explained
    for field in dataclasses.fields(kind):
        assert f"\n    {field.name}: {field.metadata['help']}" in options
    assert all(issubclass(layer, AdapterLayer) for layer in kind.LAYERS)
    assert (kind.PEFT_FIELDS is not None) == kind.IN_PEFT


@pytest.mark.parametrize("name", methods.names())
def test_what_it_stands_on_is_what_it_is_found_on(name: str) -> None:
    assert trials.stands_on(name) == methods.find(name).STANDS_ON


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_a_value(name: str) -> None:
    one, other = made(methods.find(name)), made(methods.find(name))
    assert one == other
    assert hash(one) == hash(other)
    assert dataclasses.asdict(one) == {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rank = 3  # type: ignore[attr-defined, misc]
    with pytest.raises(TypeError):
        type(one)(8)  # type: ignore[call-arg]


def test_texts_make_the_same_method() -> None:
    from mlx_adapters.methods import LoRA

    assert methods.make("lora", {"rank": "16", "rslora": "yes"}) == LoRA(rank=16, rslora=True)
    with pytest.raises(ConfigError, match="study: rank='much' is not a whole number"):
        methods.make("lora", {"rank": "much"}, where="study")


def test_a_method_from_outside_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_OUTSIDE", {})

    @methods.register
    class Other(methods.LoRA):  # type: ignore[name-defined, misc]
        """Another. Nobody 2000, https://example.org"""

        NAME = "other"

    assert methods.find("other") is Other
    assert "other" in methods.names()
    with pytest.raises(ConfigError, match="exists already"):
        methods.register(Other)


def test_the_names_need_no_mlx() -> None:
    code = (
        "import sys; from mlx_adapters import methods; methods.names(); "
        "assert 'mlx.core' not in sys.modules; methods.LoRA(rank=2); assert 'mlx.core' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _asks_a_method(node: Any) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
        and ast.unparse(node.args[0]).rpartition(".")[2] in ("method", "config", "kind", "chosen")
        and "loaded.config" not in ast.unparse(node.args[0])
    )


def test_nobody_asks_a_method_what_it_has() -> None:
    folders = ("methods", "adapter", "train", "convert", "study")
    asked = [
        f"{file.name}:{node.lineno}: {ast.unparse(node)}"
        for folder in folders
        for file in (SOURCE / folder).glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if _asks_a_method(node)
    ]
    assert not asked
