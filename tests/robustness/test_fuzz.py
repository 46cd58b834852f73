"""A thousand damaged or hostile inputs for each reader (`fuzz.py`), and what they found, by name."""

import json
import os
import struct
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from fuzz import READERS, Fuzzed, model_folder
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.data.templates import prompt_for
from mlx_adapters.errors import AdapterError, CheckpointError, DataError, reading
from mlx_adapters.files.documents import from_json, from_yaml
from mlx_adapters.models.load import read_tokenizer

COUNT = 1000


@pytest.mark.parametrize("name", READERS)
def test_a_thousand_inputs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted, or refused by an error of ours; see `fuzz.py`. Canaries would be files where we stand."""
    monkeypatch.chdir(tmp_path)
    fuzzed = Fuzzed(name, tmp_path)
    faults = [f"{name} {n}: {fault}" for n in range(COUNT) if (fault := fuzzed.attempt(n))]
    assert faults == []
    assert 0 < fuzzed.accepted < COUNT  # neither all harmless nor all garbage


def test_what_the_hand_does_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness sees a reader that fails in each of the ways it looks for."""
    monkeypatch.chdir(tmp_path)
    fuzzed = Fuzzed("jsonl", tmp_path)

    def wrong(fault: str) -> str:
        def read(folder: Path) -> None:
            if fault == "raises":
                {}["a"]
            if fault == "writes":
                Path("CANARY").touch()
            if fault == "nameless":
                raise DataError("something is wrong")
            if fault == "hangs":
                while True:
                    pass
            if fault == "grows":
                bytearray(1 << 28)[:: 1 << 12] = b"1" * (1 << 16)
            if fault == "computes":
                mx.eval(mx.arange(1 << 26))

        object.__setattr__(fuzzed.reader, "read", read)
        return fuzzed.attempt(0) or ""

    kept = fuzzed.reader.read
    try:
        monkeypatch.setattr("fuzz.SECONDS", 0.5)
        assert "KeyError" in wrong("raises")
        assert "files changed" in wrong("writes")
        assert "names no file" in wrong("nameless")
        assert "took over" in wrong("hangs")
        assert "memory grew" in wrong("computes")
        if sys.platform == "linux":  # elsewhere a test before may have held more
            assert "memory grew" in wrong("grows")
    finally:
        object.__setattr__(fuzzed.reader, "read", kept)


COMMANDS = {
    "safetensors": ["convert", "IN", "OUT"],
    "config": ["convert", "IN", "OUT"],
    "bin": ["convert", "IN", "OUT"],
    "gguf": ["convert", "IN/a.gguf", "OUT"],
    "jsonl": ["train", "MODEL", "--data", "IN/a.jsonl", "--output", "OUT", "--steps", "1"],
    "run": ["train", "MODEL", "--config", "IN/run.yaml", "--output", "OUT"],
    "study": ["study", "IN/study.yaml", "--model", "MODEL", "--output", "OUT"],
    "adapter": ["generate", "MODEL", "--adapter", "IN", "--prompt", "a"],
    "peft": ["import", "IN", "OUT", "--model", "MODEL"],
    "report": ["compare", "IN/eval.jsonl", "IN/eval.jsonl"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_says_one_line_and_exits_with_2(name: str, tmp_path: Path) -> None:
    fuzzed = Fuzzed(name, tmp_path / "fuzz")
    (tmp_path / "model").mkdir()
    model_folder(tmp_path / "model")
    fuzzed.file.write_bytes(fuzzed.whole[: len(fuzzed.whole) // 3] + b"\0[{\xff")
    places = {"IN": str(fuzzed.folder), "OUT": str(tmp_path / "out"), "MODEL": str(tmp_path / "model")}
    command = []
    for word in COMMANDS[name]:
        head, slash, tail = word.partition("/")
        command.append(places.get(head, head) + slash + tail)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, (result.output, result.exception)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert str(fuzzed.folder) in said[0]
    assert not (tmp_path / "out").exists()


def test_what_is_nested_too_deep() -> None:
    for text in ("[" * 65 + "]" * 65, '{"a":' * 100_000, '[1, {"a": ' + "[" * 70 + "]" * 70 + "}]"):
        with pytest.raises(ValueError):
            from_json(text)
    assert from_json("[" * 64 + "]" * 64)
    assert from_json(b'{"a": "[[[' + b"[" * 100 + b'"}') == {"a": "[" * 103}
    with pytest.raises(ValueError, match="64 levels"):
        from_yaml("- " * 65 + "x")


def test_yaml_aliases_are_refused() -> None:
    """Ten of them can stand for gigabytes."""
    with pytest.raises(ValueError, match=r"line 2: aliases \(\*a\) are not read"):
        from_yaml("a: &a [1, 2]\nb: *a\n")
    with pytest.raises(ValueError):
        from_yaml("a: !!python/object/apply:os.system ['touch CANARY']")
    assert not Path("CANARY").exists()
    assert from_yaml("a: [1, {b: 0.5}]") == {"a": [1, {"b": 0.5}]}


def test_a_yaml_key_given_twice_is_refused() -> None:
    """PyYAML takes the last one without a word."""
    for text in ("data: a\nrank: 1\ndata: b\n", "- 1\n- {b: 1,\n   b: 2}\n"):
        with pytest.raises(ValueError, match=r"line [23]: the key (data|b) is given twice"):
            from_yaml(text)
    assert from_yaml("a: {x: 1}\nb: {x: 1}\n") == {"a": {"x": 1}, "b": {"x": 1}}
    assert from_yaml("") is None


def test_a_foreign_value_is_named_by_its_file() -> None:
    file = Path("a/b.json")
    unusable = r"^a/b\.json: holds a value that cannot be used \(unhashable"
    with pytest.raises(AdapterError, match=unusable), reading(file, AdapterError):
        hash([])
    with pytest.raises(DataError, match=r"^a/b\.json: rank is wrong$"), reading(file, AdapterError):
        raise DataError("rank is wrong")
    with pytest.raises(KeyboardInterrupt), reading(Path("a"), AdapterError):
        raise KeyboardInterrupt


def test_more_layers_than_anybody_builds(tmp_path: Path) -> None:
    from mlx_adapters.convert.checkpoint import convert

    model_folder(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 2**31}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers.* is 2147483648; at most 1000"):
        convert(tmp_path, tmp_path / "out")


def test_a_header_larger_than_the_file_makes_no_room(tmp_path: Path) -> None:
    """In an adapter too: MLX would reserve what the header says."""
    from mlx_adapters.adapter import read_tensors

    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises((AdapterError, CheckpointError), match=r"adapter_model\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{% set x = messages.append(1) %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% if %}",
    ],
)
def test_chat_templates_run_in_a_sandbox(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    tokenizer = read_tokenizer(tmp_path, {"eos_token_id": 1})
    with pytest.raises(DataError, match="its chat template"):
        prompt_for("a", template="chat", tokenizer=tokenizer, phase="eval")
    assert "CANARY" not in os.listdir()


def test_a_name_of_any_length_is_cut_on_the_screen(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a" * 100_000 + ": 1\n")
    result = CliRunner().invoke(app, ["train", str(tmp_path), "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert len(result.stderr) < 3000
