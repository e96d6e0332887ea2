"""Makes small_votes.jsonl and small_votes_heldout.jsonl: simulated raters who like vowels, two votes on every pair.

The answers are nonsense of words and random letters, as tiny models write it. Run it from the root of the project:
`python recipes/data/make_small_votes.py`. The same files come out each time.
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


def answer(words: list[str], rng: random.Random) -> str:
    """Up to eight words, a third of them made of random letters, of which a random share are vowels."""
    vowels = rng.random()

    def word() -> str:
        if rng.random() > 1 / 3:
            return rng.choice(words)
        return "".join(
            rng.choice("aeiou" if rng.random() < vowels else string.ascii_lowercase) for _ in range(rng.randint(3, 7))
        )

    return " ".join(word() for _ in range(rng.randint(3, 8)))


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
    sentences = [json.loads(line)["messages"][-1]["content"] for line in (HERE / "smoke_sft.jsonl").open()]
    words = sorted({word.strip(".,:!?") for sentence in sentences for word in sentence.split()} - {""})
    for name, some in {"small_votes": prompts[:128], "small_votes_heldout": prompts[128:160]}.items():
        with (HERE / f"{name}.jsonl").open("w") as file:
            for prompt in some:
                answers = [answer(words, rng) for _ in range(ANSWERS)]
                row = {"prompt": prompt, "completions": answers, "wins": wins(answers, rng)}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
