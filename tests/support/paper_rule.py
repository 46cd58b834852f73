"""How LLM-Adapters' scripts find an answer and judge it, written again by hand from a description of them.

No regular expression and nothing of the package is used, so that the two can be held against each other.
"""

WORDS = {
    "true/false": ["true", "false"],
    "solution": ["solution1", "solution2"],
    "answer": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "ending": ["ending1", "ending2", "ending3", "ending4"],
    "option": ["option1", "option2"],
    "letter": ["A", "B", "C", "D", "E"],
}


def found(response: str, kind: str) -> str | float:
    """The prediction: the first word, "" for none; of numbers the last, infinity for none."""
    response = response.split("### Response:")[0]
    if kind == "number":
        return _last_number(response.replace(",", ""))
    for place in range(len(response)):
        for word in WORDS[kind]:
            if response[place : place + len(word)] == word:
                return word
    return ""


def right(response: str, kind: str, label: str) -> bool:
    """The verdict: equal, or of numbers at most a thousandth apart."""
    prediction = found(response, kind)
    if isinstance(prediction, float):
        return abs(float(label) - prediction) <= 0.001
    return prediction == label


def _last_number(text: str) -> float:
    numbers, place = [], 0
    while place < len(text):
        digits = place + (text[place] == "-")
        end = _after_digits(text, digits)
        if end == digits:
            place += 1
            continue
        if end < len(text) and text[end] == ".":
            end = _after_digits(text, end + 1)
        numbers.append(float(text[place:end]))
        place = end
    return numbers[-1] if numbers else float("inf")


def _after_digits(text: str, place: int) -> int:
    while place < len(text) and text[place].isdecimal():
        place += 1
    return place
