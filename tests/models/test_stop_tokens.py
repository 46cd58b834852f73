"""The tokens that end an answer: from every place of a folder, and in what convert and fuse write."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from spoken import TEMPLATES, make_speaker
from tiny import make_tiny
from tiny_gguf import as_written, llama_weights, write_tiny
from trained import make_adapter

from mlx_adapters.convert.checkpoint import convert
from mlx_adapters.convert.fuse import fuse
from mlx_adapters.errors import CheckpointError
from mlx_adapters.models import load as models
from mlx_adapters.models.load import read_tokenizer


def named(tokenizer: Any, tokens: Any) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(sorted(tokens)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(name: str, tmp_path: Path) -> None:
    spoken = TEMPLATES[name]
    tokenizer = read_tokenizer(make_speaker(name, tmp_path), {})
    expected = {spoken.eos or spoken.special[0], *([spoken.end] if spoken.end else [])}
    assert named(tokenizer, tokenizer.eos_token_ids) == expected


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Phi-3 is published: the end of a turn is named in generation_config.json alone."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("phi"), vocab_size=400)
    make_speaker("Phi-3", folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 6, 5], "temperature": 0.5}')
    return folder


def transformers_stop(folder: Path) -> set[int]:
    """What `generate` of transformers stops at."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    return {found} if isinstance(found, int) else set(found)


def mlx_lm_stop(folder: Path) -> set[int]:
    from mlx_lm import load

    return set(load(str(folder))[1].eos_token_ids)


def test_a_folder_used_directly_stops_where_its_generation_config_says(phi: Path) -> None:
    assert models.load(phi).tokenizer.eos_token_ids == transformers_stop(phi) == {2, 5, 6}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": [2, 5]}, None, {2, 5}),
        ({"eos_token_id": 5}, {"eos_token_id": 6}, {2, 5, 6}),
        (
            {"eos_token_id": 300},
            {"eos_token_id": 6},
            {2, 6},
        ),  # a default that was never set, an ordinary token
        ({"eos_token_id": 300}, None, {2, 300}),
        ({"text_config": {"eos_token_id": 6}}, {}, {2, 6}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {2}),
        ({"eos_token_id": -1}, {}, {2}),
    ],
)
def test_the_places_are_read_together(
    config: dict[str, Any], generation: Any, expected: set[int], phi: Path, tmp_path: Path
) -> None:
    shutil.copytree(phi, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_tokenizer(tmp_path, config).eos_token_ids == expected


@pytest.mark.parametrize("value", ["end", [2, "x"], True, 2.5])
def test_an_end_that_is_no_token_is_named(value: Any, phi: Path, tmp_path: Path) -> None:
    shutil.copytree(phi, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    for read in (lambda: read_tokenizer(tmp_path, {}), lambda: convert(tmp_path, tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path}/generation_config.json: field 'eos_token_id' is")


def test_convert_and_fuse_write_every_end_where_others_look(tmp_path: Path) -> None:
    """ChatML on a base whose configuration knows <|endoftext|> alone, as Qwen2.5's bases."""
    base = make_tiny("llama", tmp_path, vocab_size=400)
    make_speaker("Qwen2.5", base)
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": 1}
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(base, tmp_path / "adapter", "lora", {"rank": 2}, seed=1)
    for generation in (False, True):
        if generation:
            (base / "generation_config.json").write_text('{"eos_token_id": 1, "do_sample": true}')
        else:
            (base / "generation_config.json").unlink(missing_ok=True)
        places = {kind: tmp_path / f"{kind}-{generation}" for kind in ("converted", "transformers", "mlx")}
        convert(base, places["converted"])
        for to in ("transformers", "mlx"):
            fuse(base, adapter, places[to], to=to)
        for place in places.values():
            assert transformers_stop(place) == mlx_lm_stop(place) == {1, 3}, place
        if generation:
            kept = json.loads((places["converted"] / "generation_config.json").read_text())
            assert kept["do_sample"] is True


def test_gguf_names_the_ends_of_turns_and_messages(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "m.gguf", as_written(llama_weights()), eot=7, eom=9)
    convert(file, tmp_path / "out")
    assert transformers_stop(tmp_path / "out") == mlx_lm_stop(tmp_path / "out") == {2, 7, 9}
    assert models.load(tmp_path / "out").tokenizer.eos_token_ids == {2, 7, 9}
    file = write_tiny(tmp_path / "n.gguf", as_written(llama_weights()), eot=10**6)
    with pytest.raises(CheckpointError, match=r"eot_token_id' is 1000000"):
        convert(file, tmp_path / "none")
