"""Files as people have them: the exact text that is learned, or one line that helps."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spoken import make_speaker
from spoken_as_published import speaker

from mlx_adapters.data.layouts import column_names
from mlx_adapters.data.sources import check_fields, load_rows
from mlx_adapters.data.tokens import encode
from mlx_adapters.errors import DataError
from mlx_adapters.models.load import read_tokenizer

QUESTION, ANSWER = "What is 7 × 8? 🙂", "56,\nof course"
SYSTEM = "<|im_start|>system\nbe kind<|im_end|>\n"
TEXT = f"{SYSTEM}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
LEARNED = f"{ANSWER}<|im_end|>"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}

LAYOUTS: dict[str, dict[str, Any]] = {
    "Alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "Alpaca without input": {"instruction": QUESTION, "output": ANSWER},
    "Dolly": {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "open_qa"},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and response": {"prompt": QUESTION, "response": ANSWER},
    "question and answer": {"question": QUESTION, "answer": ANSWER},
    "input and output": {"input": QUESTION, "output": ANSWER},
}
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
NESTED: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages with a text in parts": {
        "messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "conversations of roles": {"conversations": TURNS},
    "lists of messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "a question behind the last answer": {"messages": [*TURNS, TURNS[0]]},
}


def _jsonl(file: Path, row: dict[str, Any]) -> None:
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")


def _windows(file: Path, row: dict[str, Any]) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\r\n")


def _data(file: Path, row: dict[str, Any]) -> None:
    file.write_text(json.dumps({"version": 1, "data": [row]}, indent=1), encoding="utf-8")


def _gzip(file: Path, row: dict[str, Any]) -> None:
    file.write_bytes(gzip.compress(json.dumps([row]).encode()))


def _zstd(file: Path, row: dict[str, Any]) -> None:
    with pa.output_stream(str(file), compression="zstd") as stream:
        stream.write(json.dumps(row).encode())


def _parquet(file: Path, row: dict[str, Any]) -> None:
    pq.write_table(pa.Table.from_pylist([row]), file)


def _arrow(file: Path, row: dict[str, Any]) -> None:
    table = pa.Table.from_pylist([row])
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def _saved(folder: Path, row: dict[str, Any]) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([row])}).save_to_disk(str(folder))


def _separated(delimiter: str) -> Callable[[Path, dict[str, Any]], None]:
    def write(file: Path, row: dict[str, Any]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerows([list(row), list(row.values())])
        file.write_bytes(text.getvalue().encode("utf-8-sig"))

    return write


FLAT: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "rows.csv": _separated(","),
    "rows.tsv": _separated("\t"),
}
DEEP: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "rows.jsonl": _jsonl,
    "windows.jsonl": _windows,
    "data.json": _data,
    "rows.json.gz": _gzip,
    "rows.jsonl.zst": _zstd,
    "rows.parquet": _parquet,
    "rows.arrow": _arrow,
    "saved": _saved,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_tokenizer(make_speaker("Qwen2.5", tmp_path_factory.mktemp("speaker")), {})


def learned(
    source: Path, tokenizer: Any, columns: str | None = None, **settings: Any
) -> list[tuple[str, str]]:
    """(what stands before, what is learned) of every training text."""
    rows = load_rows(str(source), columns=column_names(columns))
    template = "plain" if rows.format == "text" else "chat"
    examples = encode(rows, tokenizer, template=template, **settings).examples
    return [
        (
            tokenizer.decode(example.ids[: example.loss_start]),
            tokenizer.decode(
                [
                    id
                    for index, id in enumerate(example.ids)
                    if index >= example.loss_start and not any(a <= index < b for a, b in example.unlabelled)
                ]
            ),
        )
        for example in examples
    ]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in FLAT for layout in LAYOUTS]  # a table of text holds no lists
    + [(name, layout) for name in DEEP for layout in (*LAYOUTS, *NESTED)],
)
def test_every_kind_of_file_in_every_layout(name: str, layout: str, tokenizer: Any, tmp_path: Path) -> None:
    (FLAT | DEEP)[name](tmp_path / name, (LAYOUTS | NESTED)[layout])
    assert learned(tmp_path / name, tokenizer) == [(TEXT, LEARNED)]


def test_other_names_of_columns(tokenizer: Any, tmp_path: Path) -> None:
    _jsonl(tmp_path / "rows.jsonl", {"q": QUESTION, "a": ANSWER, "prompt": "something else"})
    columns = "instruction=q, output=a"
    assert learned(tmp_path / "rows.jsonl", tokenizer, columns) == [(TEXT, LEARNED)]
    with pytest.raises(
        DataError, match=r"rows.jsonl: line 1: column 'x' \(for output\) is missing; there are q, a"
    ):
        learned(tmp_path / "rows.jsonl", tokenizer, "instruction=q,output=x")


def test_a_csv_keeps_its_numbers_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer\n"007, or 1.50?",1.50\n\n008,\n')
    rows = load_rows(str(tmp_path / "rows.csv")).rows
    assert rows == [
        {"instruction": "007, or 1.50?", "output": "1.50"},
        {"instruction": "008", "output": ""},
    ]


def test_tools_reasoning_and_two_hundred_turns(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    _jsonl(file, {"messages": TURNS, "tools": json.dumps([TOOL])})
    (((before, text)),) = learned(file, tokenizer)
    assert json.dumps(TOOL) in before
    assert text == LEARNED
    turns = [turn | {"content": f"{number}"} for number in range(100) for turn in TURNS]
    _jsonl(file, {"messages": turns})
    ((_, text),) = learned(file, tokenizer)
    assert text == "".join(f"{number}<|im_end|>" for number in range(100))
    ((_, text),) = learned(file, tokenizer, loss_on="last")
    assert text == "99<|im_end|>"
    speaker = read_tokenizer(make_speaker("thinks unless told", tmp_path / "speaker"), {})
    call = [TURNS[0], TURNS[1] | {"content": None, "reasoning_content": "easy"}]
    _jsonl(file, {"messages": call})
    ((_, text),) = learned(file, speaker)
    assert text == "<think>\neasy\n</think>\n\n<|im_end|>"


BROKEN: dict[str, tuple[str, str, str]] = {
    "a ragged table": ("rows.csv", "question,answer\na,b\nc\n", r"rows.csv:3: has 1 values for 2 columns"),
    "columns twice": ("rows.csv", "a,a\n1,2\n", r"rows.csv:1: the column names"),
    "a quote that is not closed": (
        "rows.csv",
        'question,answer\na,"b\n',
        r"rows.csv:\d: is not a table of text",
    ),
    "unknown columns": (
        "rows.tsv",
        "question\tlabel\na\tb\n",
        r"line 2: field 'answer' is missing; found question",
    ),
    "another kind": ("rows.xml", "<a/>", r"rows.xml: is not a data file; known are \.json"),
    "an unknown speaker": (
        "rows.jsonl",
        '{"conversations": [{"from": "alien", "value": "a"}]}',
        r"line 1: field 'from' is 'alien', which is not one of human",
    ),
    "an image": (
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        r"line 1: message 0 has content that is not text",
    ),
    "a prompt of messages and an answer of text": (
        "rows.jsonl",
        '{"prompt": [], "completion": "a"}',
        r"line 1: field 'prompt' is a list of messages, so 'completion' must be one too",
    ),
    "no Parquet": ("rows.parquet", "nothing", r"rows.parquet: cannot be read as parquet"),
    "no gzip": ("rows.jsonl.gz", "nothing", r"rows.jsonl.gz: cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_saved_by_datasets_names_its_splits(tmp_path: Path) -> None:
    _saved(tmp_path / "saved", LAYOUTS["Alpaca"])
    with pytest.raises(DataError, match=r"saved: has no split 'test', but train"):
        load_rows(str(tmp_path / "saved"), split="test")


# Texts, folders, compressed tables ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLAT, *DEEP])
def test_texts_are_learned_whole(name: str, tokenizer: Any, tmp_path: Path) -> None:
    (FLAT | DEEP)[name](tmp_path / name, {"text": f"{QUESTION}\n{ANSWER}"})
    ((before, text),) = learned(tmp_path / name, tokenizer)
    assert before + text == f"{QUESTION}\n{ANSWER}<|endoftext|>"


def test_a_text_file_is_one_text(tokenizer: Any, tmp_path: Path) -> None:
    for name, packed in (("book.txt", False), ("book.txt.gz", True)):
        raw = f"\ufeff{QUESTION}\r\n{ANSWER}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if packed else raw)
        ((before, text),) = learned(tmp_path / name, tokenizer)
        assert (before + text).replace("\r", "") == f"{QUESTION}\n{ANSWER}\n<|endoftext|>"


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ".tsv.gz"])
def test_a_folder_of_parts_trains_on_its_train_file(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    writers = {".jsonl": _jsonl, ".csv": _separated(","), ".parquet": _parquet, ".tsv.gz": _packed_table}
    for part in ("train", "valid", "test"):
        writers[kind](tmp_path / f"{part}{kind}", LAYOUTS["Alpaca"] | {"output": part})
    assert learned(tmp_path, tokenizer) == [(TEXT, "train<|im_end|>")]


def _packed_table(file: Path, row: dict[str, Any]) -> None:
    _separated("\t")(file, row)
    file.write_bytes(gzip.compress(file.read_bytes()))


# Tool calls -----------------------------------------------------------------------------------------------

CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(*calls: tuple[str, Any]) -> dict[str, Any]:
    """A row whose answer calls tools, and answers with what they say."""
    made = [
        {"id": str(n), "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    tools = [{"role": "tool", "tool_call_id": str(n), "content": "56"} for n in range(len(calls))]
    asked = {"role": "assistant", "content": None, "tool_calls": made}
    return {"messages": [TURNS[0], asked, *tools, TURNS[1]]}


NESTED_CALLS = (
    ("add", {"a": 7, "how": {"carefully": True, "times": [1, 2]}}),
    ("ask", {"how": {"to": "Tom"}, "text": "7 × 8?"}),
)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", DEEP)
def test_nested_tool_calls(name: str, as_text: bool, tmp_path: Path) -> None:
    """Arrow gives every object the fields of all others, and OpenAI writes arguments as JSON text."""
    tokenizer = read_tokenizer(speaker(CALLING, tmp_path / "speaker"), {})
    calls = [(name, json.dumps(value) if as_text else value) for name, value in NESTED_CALLS]
    DEEP[name](tmp_path / name, called(*calls))
    ((_, text),) = learned(tmp_path / name, tokenizer)
    written = "".join(
        f"<tool_call>{name} {json.dumps(value, ensure_ascii=False)}</tool_call>"
        for name, value in NESTED_CALLS
    )
    assert text == f"{written}<|im_end|>{LEARNED}"


def test_arguments_become_text_where_the_template_takes_no_object(tmp_path: Path) -> None:
    textual = CALLING.replace("call.function.arguments | tojson", "' ' + call.function.arguments")  # DeepSeek
    tokenizer = read_tokenizer(speaker(textual, tmp_path / "speaker"), {})
    _jsonl(tmp_path / "rows.jsonl", called(("add", {"a": 7})))
    ((_, text),) = learned(tmp_path / "rows.jsonl", tokenizer)
    assert text.startswith('<tool_call>add  {"a": 7}</tool_call><|im_end|>')


# Rows that mean something else -----------------------------------------------------------------------------

PREFERENCE = (
    r"fields 'chosen' and 'rejected' are a preference, which is not learned here: --columns \w+=chosen"
)
LABEL = r"field 'label' is not read in rows of the form completion.*: put it into the text, or take it out"
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "a preference": ({"prompt": QUESTION, "chosen": ANSWER, "rejected": "no"}, PREFERENCE),
    "a preference without a question": ({"chosen": ANSWER, "rejected": "no"}, PREFERENCE),
    "a label": ({"prompt": QUESTION, "completion": ANSWER, "label": False}, LABEL),
    "a label of 0": ({"prompt": QUESTION, "completion": ANSWER, "label": 0}, LABEL),
}


@pytest.mark.parametrize("case", OTHERWISE)
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "saved"])
def test_rows_that_mean_something_else_are_refused(
    name: str, case: str, tokenizer: Any, tmp_path: Path
) -> None:
    row, message = OTHERWISE[case]
    (FLAT | DEEP)[name](tmp_path / name, row)
    where = rf"{name.partition('.')[0]}.*: (?:line|row) \d: "
    with pytest.raises(DataError, match=where + message) as caught:
        learned(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


def test_whoever_asks_for_the_chosen_answers_gets_them(tokenizer: Any, tmp_path: Path) -> None:
    _jsonl(tmp_path / "rows.jsonl", {"prompt": QUESTION, "chosen": ANSWER, "rejected": "no"})
    assert learned(tmp_path / "rows.jsonl", tokenizer, "completion=chosen") == [(TEXT, LEARNED)]
    _jsonl(tmp_path / "pairs.jsonl", {"chosen": TURNS, "rejected": TURNS[:1]})
    assert learned(tmp_path / "pairs.jsonl", tokenizer, "messages=chosen") == [(TEXT, LEARNED)]


def test_every_column_that_trl_reads_is_read_or_refused() -> None:
    """The names that SFTTrainer looks up in a row, found in its source; what it makes itself is left out."""
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "trainer" / "sft_trainer.py").read_text()
    looked_up = re.findall(r'\bexamples?(?:\[0\])?(?:\.get\(|\[)"(\w+)"', source)
    looked_up += re.findall(
        r'"(\w+)" (?:not )?in (?:example|examples\[0\]|dataset_sample|column_names|cols)\b', source
    )
    made = {"seq_lengths", "attention_mask", "text_ids"}
    names = {*looked_up} - made
    assert {"messages", "prompt", "completion", "tools", "chat_template_kwargs", "images"} <= names
    known = {"messages", "conversations", "prompt", "completion", "text", "tools", "chat_template_kwargs"}
    for name in sorted(names - known):
        with pytest.raises(DataError, match=f"field '{name}' is not read"):
            check_fields({"text": "a", name: [1]}, "text")
    for name in ("tools", "chat_template_kwargs"):
        with pytest.raises(DataError, match=f"field '{name}' is not read"):
            check_fields({"text": "a", name: [1]}, "text")
