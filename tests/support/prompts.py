"""Random prompts of many lengths."""

import random

from tiny import VOCAB


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]
