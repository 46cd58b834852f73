"""A link in somebody else's folder that leads out of it: its content goes into nothing that is written."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_tiny
from trained import make_adapter
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.convert.checkpoint import convert


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` in Hugging Face's format and a LoRA adapter `a` of it."""
    root = tmp_path_factory.mktemp("links")
    make_tiny("llama", root).rename(root / "m")
    make_adapter(root / "m", root / "a", "lora", {"rank": 2}, seed=0)
    return root


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.output, result.exception)
    return result.stderr


def led_out(folder: Path, name: str, outside: Path) -> Path:
    """`folder`, in which the file or folder `name` is a link to what it was, now outside."""
    outside.mkdir(exist_ok=True)
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    return folder


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
)
def test_a_model_s(name: str, made: Path, tmp_path: Path) -> None:
    model = led_out(Path(shutil.copytree(made / "m", tmp_path / "m")), name, tmp_path / "secret")
    for words in (
        ("convert", model, tmp_path / "out"),
        ("fuse", model, tmp_path / "out", "--adapter", made / "a"),
    ):
        assert f"{name}: is a link that leads out of its folder" in refused(*words)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "mlx_adapters.json", "seen.txt"]
)
def test_an_adapter_s(name: str, made: Path, tmp_path: Path) -> None:
    source = led_out(Path(shutil.copytree(made / "a", tmp_path / "a")), name, tmp_path / "secret")
    base = ("--base", "owner/base")
    for words in (
        ("export", source, tmp_path / "out", *base),
        ("export", source, tmp_path / "out", *base, "--format", "mlx-lm"),
        ("push", source, "owner/name", *base, "--dry-run", "--output", tmp_path / "out"),
        ("import", source, tmp_path / "out", "--model", made / "m"),
        ("fuse", made / "m", tmp_path / "out", "--adapter", source),
        ("combine", source, made / "a", tmp_path / "out"),
    ):
        assert f"{name}: is a link that leads out of its folder" in refused(*words), words
        assert not (tmp_path / "out").exists()


def test_a_whole_folder_s(made: Path, tmp_path: Path) -> None:
    """Members of a fusion are copied with all that is below them."""
    source = Path(shutil.copytree(made / "a", tmp_path / "a"))
    (tmp_path / "home" / "members").mkdir(parents=True)
    (source / "members").mkdir()
    led_out(source, "members", tmp_path / "other")
    said = refused("export", source, tmp_path / "out", "--base", "owner/base")
    assert "members: is a link that leads out of its folder" in said
    assert not (tmp_path / "out").exists()


def test_the_hub_s_cache_is_links_to_its_blobs(made: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("0123456789" * 4)
    blobs = tmp_path / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((made / "m").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    done = convert(snapshot, tmp_path / "out")
    assert json.loads((done.path / "config.json").read_text())["model_type"] == "llama"
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(made / "m" / "config.json")
    assert "leads out of its folder" in refused("convert", snapshot, tmp_path / "other")
