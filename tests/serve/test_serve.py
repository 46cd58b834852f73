"""`mlx-adapters serve` over HTTP, as a process: three adapters on a tiny model, many clients, errors."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import HOLD, LONG, METHODS, PROMPTS, Running, said
from typer.testing import CliRunner

from mlx_adapters.cli.app import app
from mlx_adapters.serve.engine import _begun


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Running]:
    running = Running(base, "--max-tokens", str(2 * LONG))
    yield running
    running.process.kill()
    running.process.communicate()


def test_models_are_the_base_and_the_adapters(server: Running, base: Path) -> None:
    status, text = server.send("/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(text)["data"]] == [base.name, *METHODS]
    assert json.loads(server.send("/v1/models/lora")[1])["id"] == "lora"
    assert server.send("/v1/models/nope")[0] == 404


def test_answers_equal_the_command_line_with_many_clients(
    server: Running, base: Path, expected: dict[tuple[str, str], str]
) -> None:
    """Ten clients at once, each going through all models: switching between tokens mixes nothing up."""
    assert len({expected[name, PROMPTS[0]] for name in (base.name, *METHODS)}) == 4, "each has its own answer"
    asks = [pair for shift in range(3) for pair in [*expected][shift::3]] * 2
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda pair: server.ask(*pair), asks))
    for pair, answer in zip(asks, answers, strict=True):
        assert said(answer) == expected[pair], pair
        assert answer["model"] == pair[0]
        assert answer["object"] == "chat.completion"
        assert answer["usage"]["total_tokens"] == sum(
            answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")
        )


def test_completions_read_the_prompt_as_it_is(server: Running, expected: dict[tuple[str, str], str]) -> None:
    body = {"model": "prefix", "prompt": PROMPTS[0], "max_tokens": HOLD}
    status, text = server.send("/v1/completions", json.dumps(body).encode())
    answer = json.loads(text)
    assert (status, answer["object"]) == (200, "text_completion")
    assert (
        answer["choices"][0]["text"] == expected["prefix", PROMPTS[0]]
    )  # the tiny model's template is plain


def events(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    status, text = server.send(path, json.dumps({**body, "stream": True, "max_tokens": HOLD}).encode())
    assert status == 200, text
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_stream_is_the_same_answer_in_pieces(server: Running, expected: dict[tuple[str, str], str]) -> None:
    chat = {"model": "lora", "messages": [{"role": "user", "content": PROMPTS[1]}]}
    got = events(server, "/v1/chat/completions", {**chat, "stream_options": {"include_usage": True}})
    *pieces, usage = got
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert len(deltas) > 2
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta["content"] for delta in deltas) == expected["lora", PROMPTS[1]]
    assert [p["choices"][0]["finish_reason"] for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert usage["usage"]["completion_tokens"] == server.ask("lora", PROMPTS[1])["usage"]["completion_tokens"]
    plain = events(server, "/v1/completions", {"model": "lora", "prompt": PROMPTS[1]})
    assert "".join(piece["choices"][0]["text"] for piece in plain) == expected["lora", PROMPTS[1]]


def test_a_stop_text_ends_the_answer_before_it(
    server: Running, base: Path, expected: dict[tuple[str, str], str]
) -> None:
    whole = expected[base.name, PROMPTS[0]]
    stop = whole[len(whole) // 2 :][:4]
    answer = server.ask(base.name, PROMPTS[0], stop=[stop])
    assert said(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    body = {"model": base.name, "prompt": PROMPTS[0], "stop": stop}
    pieces = events(server, "/v1/completions", body)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole[: whole.index(stop)]
    assert _begun("a\n\nQ", ("\n\nQ:",)) == 3
    assert _begun("abc", ("x",)) == 0


def test_fields_that_leave_the_answer_as_it_is_are_taken(server: Running) -> None:
    """What clients send along: empty values, and who asks."""
    plain = said(server.ask("lora", PROMPTS[0]))
    fields = {"user": "me", "metadata": {"a": "b"}, "n": 1, "tools": [], "logit_bias": None, "top_k": -1}
    fields |= {"tool_choice": "none", "store": False, "response_format": {"type": "text"}, "seed": None}
    messages = [{"role": "user", "content": PROMPTS[0], "name": "me", "tool_calls": None}]
    assert said(server.ask("lora", PROMPTS[0], messages=messages, **fields)) == plain


def test_a_seed_repeats_a_sample_beside_others(server: Running) -> None:
    def draw(seed: int) -> str:
        return said(server.ask("lora", PROMPTS[0], temperature=1.5, top_p=0.95, seed=seed))

    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(4)))
    assert alone == together
    assert len(set(alone)) > 1
    fresh = {said(server.ask("lora", PROMPTS[0], temperature=1.5, top_p=0.95)) for _ in range(4)}
    assert len(fresh) > 1, "without a seed every answer is drawn anew"


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 200_000, 400, "nested deeper than 64 levels"),
        (b"[]", 400, "must be a JSON object"),
        ({}, 400, "model must be"),
        ({"model": "nope"}, 404, "no model 'nope'"),
        ({"max_tokens": -1}, 400, "max_tokens must be a whole number from 1"),
        ({"max_tokens": 1e3}, 400, "max_tokens must be"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens must be"),
        ({"max_tokens": 2 * LONG + 1}, 400, f"from 1 to {2 * LONG}"),
        ({"max_tokens": LONG}, 400, f"reads at most {LONG} tokens"),
        ({"temperature": float("nan")}, 400, "temperature must be"),
        ({"temperature": True}, 400, "temperature must be"),
        ({"top_p": 0}, 400, "top_p must be"),
        ({"seed": -1}, 400, "seed must be"),
        ({"stop": [1]}, 400, "stop must be"),
        ({"stream": "yes"}, 400, "stream must be true or false"),
        ({"n": 2}, 400, "n is not supported"),
        ({"n": True}, 400, "n is not supported"),
        ({"logprobs": 0}, 400, "logprobs is not supported"),
        ({"best_of": 2}, 400, "best_of is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"typical_p": 0.5}, 400, "typical_p is not supported"),
        ({"prompt": "x"}, 400, "prompt is not supported"),
        ({"tools": [{}]}, 400, "tools is not supported"),
        ({"tool_choice": "required"}, 400, "tool_choice is not supported"),
        ({"top_k": 1.5}, 400, "top_k must be a whole number"),
        ({"min_p": 2}, 400, "min_p must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty must be"),
        ({"presence_penalty": 3}, 400, "presence_penalty must be a number from -2 to 2"),
        ({"chat_template_kwargs": 1}, 400, "chat_template_kwargs must be an object"),
        ({"chat_template_kwargs": {"x": "\ud800"}}, 400, "surrogate"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "enable_thinking"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            400,
            "messages[0].tool_calls is not supported",
        ),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [1]}, 400, "messages[0] must be an object"),
        ({"messages": [{"role": "king", "content": ""}]}, 400, "messages[0].role must be"),
        ({"messages": [{"role": "user", "content": 1}]}, 400, "messages[0].content must be text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "must be the user's"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "no tokens"),
    ],
)
def test_a_wrong_request_gets_a_clear_error(server: Running, fields: Any, status: int, words: str) -> None:
    if isinstance(fields, dict) and fields:
        fields = {"model": "lora", "messages": [{"role": "user", "content": "tom"}], **fields}
    assert words in server.refused(status, fields)


def test_what_is_wrong_with_the_http_gets_one_too(server: Running) -> None:
    assert "nothing at /v1/nope" in server.refused(404, {}, "/v1/nope")
    assert "larger than" in server.refused(413, b"", headers={"Content-Length": "9" * 30})
    assert "Content-Length" in server.refused(411, b"", headers={"Content-Length": "-5"})
    assert "application/json" in server.refused(415, b"{}", headers={"Content-Type": "text/plain"})
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(b"BREW /pot HTTP/1.1\r\n\r\n")
        assert b'"Unsupported method' in raw.makefile("rb").read()


def test_a_client_that_leaves_is_not_answered_on(server: Running) -> None:
    """A very long answer would take minutes; once its reader is gone the next one gets the machine."""
    body = json.dumps({"model": "lora", "prompt": "tom", "max_tokens": LONG - 100}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    for _ in range(8):  # as many as are answered at once
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
            raw.sendall(head.encode() + body)
            time.sleep(0.05)
    start = time.monotonic()
    server.ask("prompt", "how many ?")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly_even_while_it_answers(base: Path, number: int) -> None:
    running = Running(base, "--max-tokens", str(2 * LONG))
    got: list[tuple[int, str]] = []
    body = json.dumps({"model": "lora", "prompt": "tom", "max_tokens": LONG - 100}).encode()
    client = threading.Thread(target=lambda: got.append(running.send("/v1/completions", body)))
    client.start()
    time.sleep(1)
    code, said = running.end(number)
    assert (code, said.removeprefix("stopping ...\n")) == (0, "stopped\n")  # told where a step takes long
    client.join(30)
    assert got[0][0] == 503, got


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "=x"], "give NAME=FOLDER"),
        (["--adapter", "a=/nowhere"], "/nowhere"),
        (["--adapter", "a=x", "--adapter", "a=y"], "two models would be named a"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
    ],
)
def test_wrong_options_exit_with_one_line(base: Path, options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(base), *options])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ten_clients_for_a_minute(server: Running, base: Path, expected: dict[tuple[str, str], str]) -> None:
    """No error, answers equal to the command line's, memory flat after the first ten seconds."""
    pairs = [pair for pair in expected if pair[0] != base.name]
    end, done, resident = time.monotonic() + 60, [0] * 10, list[int]()

    def client(number: int) -> None:
        while time.monotonic() < end:
            pair = pairs[(number + done[number]) % len(pairs)]
            assert said(server.ask(*pair)) == expected[pair], pair
            done[number] += 1

    with ThreadPoolExecutor(10) as pool:
        clients = [pool.submit(client, number) for number in range(10)]
        while time.monotonic() < end:
            time.sleep(5)
            resident.append(server.memory())
        for one in clients:
            one.result()
    print(f"answers {sum(done)}, each client {min(done)} to {max(done)}; MB {[m >> 20 for m in resident]}")
    assert min(done) * 2 > max(done), done
    assert max(resident[2:]) < resident[1] * 1.05, resident
