"""An adapter by its hub id wherever a folder is taken, and PEFT's own folders as they are.

The hub's client reads its environment once, so all commands run in one process of their own.
"""

import json
import subprocess
import sys
from os import environ
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hub_server import Hub
from tiny import make_tiny
from trained import make_adapter

from mlx_adapters import adapter
from mlx_adapters.adapter.located import located, short_name
from mlx_adapters.adapter.other_base import other_base, say_other_base
from mlx_adapters.convert import exchange
from mlx_adapters.convert.torch_bin_write import write_bin
from mlx_adapters.errors import AdapterError
from mlx_adapters.generate.text import generate
from mlx_adapters.methods.lora import LoRA
from mlx_adapters.models import load as models

ID = "owner/desk"
ROWS = [{"prompt": "tom has 3", "completion": "4"}, {"prompt": "how many ?", "completion": "7"}]
# Each command twice: with the adapter's folder, and with its hub id. {a} is the adapter, {o} an output.
COMMANDS = {
    "generate": "generate {m} --prompt tom --max-tokens 5 --adapter {a} --json",
    "eval": "eval {m} --task {r}/test.json --adapter {a}@v1 --max-tokens 2 --json",
    "info": "info {a} --json",
    "export": "export {a} {o} --base owner/base",
    "combine": "combine {a} {a}@v1 {o}",
    "import": "import {a} {o} --model {m}",
    "fuse": "fuse {m} {o} --adapter {a}",
    "train": "train {m} --data {r}/rows.jsonl --adapter {a} --output {o} --steps 1 --batch-size 1",
    "push": "push {a} owner/other --base owner/base --dry-run --output {o}",
}
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from mlx_adapters.cli.app import app

found = {}
for name, arguments in json.loads(sys.stdin.read()).items():
    done = CliRunner().invoke(app, arguments)
    found[name] = [done.exit_code, done.output, repr(done.exception)]
import mlx_adapters
from mlx_adapters.adapter.multi import load_named, names
loaded, _ = load_named(sys.argv[1], ["owner/desk@v1", "other=owner/desk"], base="base")
found["names"] = names(loaded.model)
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of PEFT's two files, the same with a `.bin`, and data."""
    root = tmp_path_factory.mktemp("located")
    make_adapter(make_tiny("llama", root), root / "ours", "lora", {"rank": 4}, seed=3)
    for name in ("peft", "old"):
        (root / name).mkdir()
        (root / name / adapter.CONFIG).write_text((root / "ours" / adapter.CONFIG).read_text())
    weights = root / "ours" / adapter.WEIGHTS
    (root / "peft" / adapter.WEIGHTS).write_bytes(weights.read_bytes())
    write_bin(root / "old" / "adapter_model.bin", mx.load(str(weights)))  # type: ignore[arg-type]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "test.json").write_text(json.dumps([{"instruction": "tom has 3", "answer": "4"}]))
    return root


def arguments(command: str, root: Path, which: Path | str, name: str) -> list[str]:
    places = {"m": root / "llama", "r": root, "o": root / f"{name}-{'hub' if which == ID else 'here'}"}
    if which != ID:
        command = command.replace("@v1", "")
    return [part.format(a=which, **places) for part in command.split()]


@pytest.fixture(scope="module")
def by_id(root: Path) -> dict[str, Any]:
    """What every command gives where the adapter is a hub id, of PEFT's old kind: {name: [code, output]}."""
    hub = Hub(root / "old", root)
    given = {name: arguments(command, root, ID, name) for name, command in COMMANDS.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root / "llama")],
        env={**environ, **hub.environment},
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=300,
    )
    hub.server.shutdown()
    hub.server.server_close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("FOUND")[2])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hub_id_is_taken_wherever_a_folder_is(name: str, by_id: dict[str, Any], root: Path) -> None:
    from command_line import cli

    code, output, error = by_id[name]
    assert code == 0, (output, error)
    here = cli(*arguments(COMMANDS[name], root, root / "peft", name))
    if "--json" in COMMANDS[name]:
        read = json.JSONDecoder().raw_decode  # what is said on stderr stands in the output too
        ours, theirs = (read(text, text.index("{"))[0] for text in (here.output, output))
        keys = {"generate": ("text", "tokens"), "eval": ("tasks", "template"), "info": ("method", "fields")}
        assert [ours[key] for key in keys[name]] == [theirs[key] for key in keys[name]]
    elif name != "train":
        weights = sorted((root / f"{name}-here").glob("*.safetensors"))
        assert weights
        for file in weights:
            one, other = (mx.load(str(root / f"{name}-{at}" / file.name)) for at in ("here", "hub"))
            assert one.keys() == other.keys()  # type: ignore[union-attr]
            assert all(bool(mx.array_equal(one[k], other[k])) for k in one)  # type: ignore[index,call-overload]


def test_a_hub_id_gives_its_name(by_id: dict[str, Any]) -> None:
    assert by_id["names"] == ["desk", "other"]
    assert short_name("owner/desk@v1") == "desk"


def test_a_hub_that_does_not_answer_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from command_line import cli

    monkeypatch.chdir(root)
    for name in ("generate", "export", "info", "train", "combine"):
        done = cli(*arguments(COMMANDS[name], root, ID, "no"), code=2)
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith(f"error: {ID}: no such folder, and the hub did not give it (")
    (root / "owner" / "desk").mkdir(parents=True)
    assert located(ID) == Path(ID)  # a folder is what is meant where there is one


def test_old_files_of_peft_compute_the_same(root: Path) -> None:
    base = models.load(root / "llama", answering=True)
    said = {name: generate(base, "tom has", adapter=root / name, max_tokens=8) for name in ("peft", "old")}
    assert said["peft"] == said["old"] != generate(base, "tom has", max_tokens=8)
    (root / "old" / "broken").mkdir()
    (root / "old" / "broken" / adapter.CONFIG).write_text((root / "old" / adapter.CONFIG).read_text())
    write_bin(root / "old" / "broken" / "adapter_model.bin", {"a": mx.zeros(1)})
    with pytest.raises(AdapterError, match=r"broken/adapter_model.bin: 1 unexpected tensor, e.g. a"):
        adapter.load(base, root / "old" / "broken")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mlx_lms_folder_computes_the_same(method: str, root: Path) -> None:
    ours = make_adapter(root / "llama", root / f"own-{method}", method, {"rank": 4, "layers": "1"}, seed=5)
    theirs = root / f"mlx-lm-{method}"
    exchange.export(ours, theirs, format="mlx-lm")
    base = models.load(root / "llama", answering=True)
    said = [generate(base, "tom has", adapter=folder, max_tokens=8) for folder in (ours, theirs)]
    assert said[0] == said[1] != generate(base, "tom has", max_tokens=8)
    meta = adapter.load(base, theirs)
    assert (meta.method.NAME, meta.method.targets) == (method, "q_proj,v_proj")  # type: ignore[attr-defined]
    adapter.save(base, root / f"saved-{method}")
    one, other = (mx.load(str(folder / adapter.WEIGHTS)) for folder in (ours, root / f"saved-{method}"))
    assert one.keys() == other.keys()  # type: ignore[union-attr]
    assert all(bool(mx.array_equal(one[k], other[k])) for k in one)  # type: ignore[index,call-overload]
    with pytest.raises(AdapterError, match=r"is mlx-lm's, .* mlx-adapters import SRC DST --model MODEL"):
        exchange.export(theirs, root / "no", format="peft", base="owner/base")
    fields = json.loads((theirs / adapter.CONFIG).read_text())
    (theirs / adapter.CONFIG).write_text(json.dumps(fields | {"fine_tune_type": "full"}))
    with pytest.raises(AdapterError, match="fine_tune_type 'full' is not an adapter"):
        adapter.read_meta(theirs)


@pytest.mark.parametrize("method", ["lora", "series"])
def test_llm_adapters_folder_computes_the_same(method: str, root: Path) -> None:
    ours = make_adapter(root / "llama", root / f"paper-{method}", method, {}, seed=5)
    theirs = root / f"llm-adapters-{method}"
    exchange.export(ours, theirs, format="llm-adapters", base="owner/base")
    base = models.load(root / "llama", answering=True)
    said = [generate(base, "tom has", adapter=folder, max_tokens=8) for folder in (ours, theirs)]
    assert said[0] == said[1] != generate(base, "tom has", max_tokens=8)


def test_adapterhubs_folder_is_to_be_imported_first(root: Path) -> None:
    ours = make_adapter(root / "llama", root / "seq_bn", "seq_bn", {}, seed=5)
    exchange.export(ours, root / "hub", format="adapterhub")
    with pytest.raises(AdapterError, match="If it is AdapterHub's: mlx-adapters import SRC DST"):
        adapter.read_meta(root / "hub")


@pytest.mark.parametrize(
    ("named", "here", "differs"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit", False),
        ("Qwen/Qwen3-4B", "mlx-community/Qwen3-4B-4bit", False),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base", True),
        ("microsoft/phi-2", "microsoft/phi-3", True),
        ("/home/me/model", "owner/model", False),
        ("owner/model", None, False),
    ],
)
def test_another_base_is_said_in_one_line(
    named: str, here: str | None, differs: bool, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = models.load(root / "llama")
    if here:
        base.config["mlx_adapters"] = {"source": here}
    meta = adapter.AdapterMeta(method=LoRA(), base={"_name_or_path": named})
    assert other_base(meta, base) == ((named, here) if differs else None)
    say_other_base("desk", meta, base)
    assert capsys.readouterr().err.count("\n") == differs


def test_it_is_said_where_an_adapter_is_put_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = models.load(root / "llama")
    base.config["mlx_adapters"] = {"source": "owner/other"}
    folder = root / "named"
    folder.mkdir()
    fields = json.loads((root / "peft" / adapter.CONFIG).read_text())
    (folder / adapter.CONFIG).write_text(json.dumps(fields | {"base_model_name_or_path": "owner/base"}))
    (folder / adapter.WEIGHTS).write_bytes((root / "peft" / adapter.WEIGHTS).read_bytes())
    generate(base, "tom", adapter=folder, max_tokens=1)
    assert "was trained on owner/base, but this base is owner/other" in capsys.readouterr().err
