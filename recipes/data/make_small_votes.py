"""Makes small_votes.jsonl and small_votes_heldout.jsonl: simulated raters who like vowels, two votes on every pair.

The answers are nonsense of pieces of sentences and random letters, with and without repetitions, as tiny models write
it. `python recipes/data/make_small_votes.py` makes the same files each time.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import string
from pathlib import Path

from rlhf_cli.recipe.data import read_prompts
from rlhf_cli.server.crowd import sharpness
from rlhf_cli.server.tastes import letters

HERE = Path(__file__).parent
ANSWERS = 4
RATERS = 2
AGREEMENT = 0.85


def answer(sentences: list[list[str]], rng: random.Random) -> str:
    """Up to 14 words drawn from a few: from one word again and again to pieces of many sentences and random letters."""
    vowels = rng.random()

    def piece() -> list[str]:
        if rng.random() < 0.2:
            letter = [rng.choice("aeiou" if rng.random() < vowels else string.ascii_lowercase) for _ in range(5)]
            return ["".join(letter[: rng.randint(1, 5)])]
        sentence = rng.choice(sentences)
        start = rng.randrange(len(sentence))
        return sentence[start : start + rng.randint(1, 4)]

    pieces = [piece() for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 12)))]
    words: list[str] = []
    length = rng.randint(4, 14)
    while len(words) < length:
        words += rng.choice(pieces)
    return " ".join(words[:length])


def wins(answers: list[str], rng: random.Random) -> list[list[int]]:
    """How often each answer was preferred to each other one."""
    counts = [[0] * len(answers) for _ in answers]
    for i, j in itertools.combinations(range(len(answers)), 2):
        gap = sharpness(AGREEMENT) * (letters("", answers[i]) - letters("", answers[j]))
        for _ in range(RATERS):
            first = rng.random() < 0.5 + 0.5 * math.tanh(0.5 * gap)
            counts[i if first else j][j if first else i] += 1
    return counts


def main() -> None:
    rng = random.Random(7)
    prompts = [prompt.messages[-1].content for prompt in read_prompts(HERE / "everyday_train.jsonl")]
    sentences = [json.loads(line)["messages"][-1]["content"].split() for line in (HERE / "smoke_sft.jsonl").open()]
    for name, some in {"small_votes": 2 * prompts[:160], "small_votes_heldout": prompts[160:]}.items():
        with (HERE / f"{name}.jsonl").open("w") as file:
            for prompt in some:
                answers = [answer(sentences, rng) for _ in range(ANSWERS)]
                row = {"prompt": prompt, "completions": answers, "wins": wins(answers, rng)}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
