"""How the rows of the public data sets become the questions and answers of LLM-Adapters.

The instruction texts are those its files were made with, to the space: a model trained on them is asked the
same way wherever the test set came from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_adapters.errors import DataError

__all__ = ["HUB", "Hub", "pairs"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hub:
    """A data set of the hub, and how one of its rows becomes (instruction, answer)."""

    id: str
    config: str | None
    pair: Callable[[Row], tuple[str, str]]
    split: str = "test"


def pairs(hub: Hub, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows in the schema of `hub` as instruction and answer; DataError names the row and the field."""
    found = []
    for index, row in enumerate(rows):
        where = f"{hub.id}: item {index}"
        try:
            instruction, answer = hub.pair(row)
        except KeyError as error:
            raise DataError(f"{where}: field {error.args[0]!r} is missing; found {sorted(row)}") from None
        except (IndexError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{where}: not in the expected form ({error})") from None
        found.append({"instruction": instruction, "answer": answer})
    return found


def _gsm8k(row: Row) -> tuple[str, str]:
    return row["question"], row["answer"].rsplit("####", 1)[1].strip().replace(",", "")


def _lettered(question: str, options: Sequence[str]) -> str:
    """Options come as "A)21": the prompt has "(A) 21". As published, every bracket gets its space."""
    choices = "".join(f"({option}" for option in options).replace("(", " (").replace(")", ") ")
    return f"{question.strip()} Answer Choices:{choices}"


def _aqua(row: Row) -> tuple[str, str]:
    return _lettered(row["question"], row["options"]), row["correct"]


def _math_qa(row: Row) -> tuple[str, str]:
    """As published: every a-f of the options is a capital, because that made "a )" into "A )"."""
    options = row["options"].translate(_A_TO_F)
    return f"{row['Problem']} The options: {options}", row["correct"].upper()


_A_TO_F = str.maketrans("abcdef", "ABCDEF")


def _svamp(row: Row) -> tuple[str, str]:
    body, question = row["Body"].strip(), row["Question"].strip()
    return f"{body if body.endswith(('.', '?', '!')) else body + '.'} {question}", str(row["Answer"])


def _multiarith(row: Row) -> tuple[str, str]:
    return f" {row['question'].strip()} ", str(row["final_ans"])  # as published: a blank on both sides


def _boolq(row: Row) -> tuple[str, str]:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer is {row['answer']!r}, not true or false")
    ask = "Please answer the following question with true or false, question: "
    return f"{ask}{row['question']}?\n\nAnswer format: true/false", str(row["answer"]).lower()


def _piqa(row: Row) -> tuple[str, str]:
    solutions = f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}"
    return (
        f"Please choose the correct solution to the question: {row['goal']}\n\n{solutions}\n\n"
        "Answer format: solution1/solution2",
        f"solution{int(row['label']) + 1}",
    )


def _answers(question: str, texts: Sequence[str], right: int) -> tuple[str, str]:
    """The form of SIQA, ARC and OpenBookQA."""
    choices = " ".join(f"Answer{number}: {text}" for number, text in enumerate(texts, start=1))
    form = "/".join(f"answer{number}" for number in range(1, len(texts) + 1))
    ask = "Please choose the correct answer to the question: "
    return f"{ask}{question}\n\n{choices}\n\nAnswer format: {form}", f"answer{right + 1}"


def _siqa(row: Row) -> tuple[str, str]:
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _answers(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


def _arc(row: Row) -> tuple[str, str]:
    choices = row["choices"]  # keys are A-E in most rows, 1-4 in some
    return _answers(row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def _openbookqa(row: Row) -> tuple[str, str]:
    choices = row["choices"]
    return _answers(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"]))


def _hellaswag(row: Row) -> tuple[str, str]:
    endings = " ".join(f"Ending{number}: {text}" for number, text in enumerate(row["endings"], start=1))
    return (
        "Please choose the correct ending to complete the given sentence: "
        f"{row['activity_label']}: {row['ctx']}\n\n{endings}\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        f"ending{int(row['label']) + 1}",
    )


def _winogrande(row: Row) -> tuple[str, str]:
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "  # one line, as published
        "Answer format: option1/option2",
        f"option{int(row['answer'])}",
    )


# Test labels of BoolQ, PIQA, SIQA, HellaSwag and WinoGrande are not public: the paper takes their validation
# split. AddSub, SingleEq and the paper's cut of MAWPS are not on the hub in this form.
HUB = {
    "gsm8k": Hub("openai/gsm8k", "main", _gsm8k),
    "AQuA": Hub("deepmind/aqua_rat", "raw", _aqua),
    "SVAMP": Hub("ChilleD/SVAMP", None, _svamp),
    "MultiArith": Hub("ChilleD/MultiArith", None, _multiarith),
    "mathqa": Hub("allenai/math_qa", None, _math_qa),
    "boolq": Hub("google/boolq", None, _boolq, "validation"),
    "piqa": Hub("ybisk/piqa", None, _piqa, "validation"),
    "social_i_qa": Hub("allenai/social_i_qa", None, _siqa, "validation"),
    "hellaswag": Hub("Rowan/hellaswag", None, _hellaswag, "validation"),
    "winogrande": Hub("allenai/winogrande", "winogrande_xl", _winogrande, "validation"),
    "ARC-Easy": Hub("allenai/ai2_arc", "ARC-Easy", _arc),
    "ARC-Challenge": Hub("allenai/ai2_arc", "ARC-Challenge", _arc),
    "openbookqa": Hub("allenai/openbookqa", "main", _openbookqa),
}
