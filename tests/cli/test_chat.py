"""Chat through a pipe and a terminal: turns, cache, switching."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import make_tiny
from trained import make_adapter

from mlx_adapters.adapter.multi import load_adapters
from mlx_adapters.errors import ConfigError
from mlx_adapters.generate.conversation import Conversation
from mlx_adapters.generate.text import Prompt
from mlx_adapters.models import load as models

COMMAND = [sys.executable, "-m", "mlx_adapters.cli.app", "chat"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    folder = make_tiny("llama", root)
    for method, fields in METHODS.items():
        make_adapter(folder, root / method, method, fields, seed=3)
    return folder


def test_the_cache_changes_nothing(base: Path) -> None:
    """Three turns under each adapter and the base: as with a cache made new for every answer."""
    loaded = models.load(base)
    metas = load_adapters(loaded, {name: base.parent / name for name in METHODS})
    loaded.model.eval()
    chat, fresh = (Conversation(loaded, metas, template="plain", max_tokens=12) for _ in range(2))
    said = set()
    for name in [None, *METHODS]:
        for one in (chat, fresh):
            one.use(name)
            one.turns = []
        for number, line in enumerate(("tom has 3 apples", "how many ?", "buys 4 more")):
            answers = []
            for one in (chat, fresh):
                one.turns.append({"role": "user", "content": line})
                if one is fresh:
                    one.forget()
                answers.append("".join(one.answer()))
                one.turns.append({"role": "assistant", "content": answers[-1]})
            assert answers[0] == answers[1], (name, number)
        said.add(json.dumps(chat.turns))
    assert len(said) == 1 + len(METHODS), "each adapter answers in its own way"


def test_a_second_turn_reads_only_what_is_new(base: Path) -> None:
    loaded = models.load(base)
    chat = Conversation(loaded, template="plain", max_tokens=4)
    ids = list(range(5, 25))
    assert chat._continue(Prompt(ids, ids)) == ids
    chat.read = ids
    loaded.model(mx.array([ids]), cache=chat.cache)
    for then, unread in (([*ids, 30, 31], [30, 31]), ([*ids[:6], 40], [40])):
        assert chat._continue(Prompt(then, then)) == unread


def test_a_pipe_gets_answers_without_control_codes(base: Path, tmp_path: Path) -> None:
    lines = [
        "tom has 3 apples",
        "/nope",
        "/adapter off",
        "/compare",
        "how many ?",
        f"/save {tmp_path}/c.json",
    ]
    command = [*COMMAND, str(base), "--adapter", str(base.parent / "lora"), "--max-tokens", "5"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert "unknown command /nope" in done.stderr
    assert "now: base" in done.stderr
    assert "[base]\n" in done.stdout
    assert "[lora]\n" in done.stdout
    turns = json.loads((tmp_path / "c.json").read_text())
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[1]["content"].split()[:1] == done.stdout.split()[:1]


def test_what_can_be_typed_in_a_conversation(base: Path) -> None:
    lines = [
        "tom has",
        "/retry",
        "/system be kind",
        "/temperature 0.8",
        "/temperature hot",
        '"""how many',
        'apples ?"""',
    ]
    lines += ["/help", "exit", "never read"]
    command = [*COMMAND, str(base), "--template", "plain", "--max-tokens", "4"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    first, again, *rest = done.stdout.split("\n")
    assert again == first, "the greedy answer to the same message"
    assert "system message: be kind" in done.stderr
    assert "temperature: 0.8" in done.stderr
    assert "/temperature hot: write a number" in done.stderr
    assert sum(bool(line) and not line.startswith(("/", '"')) for line in rest) == 1, rest  # and HELP


def test_a_message_can_be_answered_again_under_another_system_message(base: Path) -> None:
    chat = Conversation(models.load(base), template="plain", system="tom", max_tokens=6)
    with pytest.raises(ConfigError, match="no message to answer again"):
        list(chat.retry())
    first = "".join(chat.ask("how many ?"))
    assert "".join(chat.retry()) == first
    assert len(chat.turns) == 2
    with_system = chat.question().ids
    chat.order("/system off")
    assert len(chat.question().ids) < len(with_system)


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(base: Path) -> None:
    leader, follower = pty.openpty()
    command = [*COMMAND, str(base), "--template", "plain", "--max-tokens", "100000"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    got = ""

    def wait_for(words: str, since: int = 0) -> None:
        nonlocal got
        end = time.monotonic() + 60
        while words not in got[since:]:
            assert time.monotonic() < end, got[-500:]
            if select.select([leader], [], [], 0.1)[0]:
                got += os.read(leader, 4096).decode(errors="replace")

    try:
        wait_for("base> ")
        at = len(got)
        os.write(leader, b"tom has\n")
        wait_for("w", at + 10)
        at = len(got)
        process.send_signal(signal.SIGINT)
        wait_for("base> ", at)
        os.write(leader, b"\x04")
        assert process.wait(timeout=30) == 0, got[-500:]
    finally:
        process.kill()
        os.close(leader)
