"""How well a reward model learns human judgement, on real ratings, beside rules, a linear head, and people themselves.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/reward_model.py hutto_ICWSM_2014.tar.gz
    OMP_WAIT_POLICY=PASSIVE python benchmarks/reward_model.py rated_snippets.jsonl --json FILE

The data are the ratings of the VADER study (Hutto and Gilbert, 2014; MIT licence), 15 or more people a text. The
archive is additional_resources/hutto_ICWSM_2014.tar.gz of https://github.com/cjhutto/vaderSentiment; a JSONL file has
rows of {"id", "domain", "text", "ratings"}, and --data-only makes one of the archive.

Everything learns from nine tenths of the film reviews and tweets, and is asked about the other tenth and about product
reviews, a domain that it never saw: of two texts of one domain, which did people rate higher? All pairs count whose
mean ratings differ. Intervals come from resampling texts, not pairs, for a text is in many pairs. Ours is `rlhf
train-rm` on recipes/rm-snippets.yaml, in a process of its own; its folder is loaded with transformers alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from machine import machine, write
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_cli.policy.packaged import pull
from rlhf_cli.recipe.data import read_voted_groups
from rlhf_cli.recipe.votes import VotedGroup

RECIPE = Path(__file__).parents[1] / "recipes" / "rm-snippets.yaml"
SEEN, UNSEEN = ("movieReviewSnippets", "tweets"), "amazonReviewSnippets"
MOST_TRAINING_TEXTS, MOST_HELD_OUT = 8600, 2400
HALVES, RESAMPLES, MAX_TOKENS = 20, 1000, 96


@dataclass(frozen=True, slots=True)
class Text:
    """A text with all its ratings."""

    id: str
    domain: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.ratings) / len(self.ratings)

    @property
    def place(self) -> float:
        """Between 0 and 1, the same on every machine: what chooses texts."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8]) / 2**64

    def row(self) -> str:
        return json.dumps({"id": self.id, "domain": self.domain, "text": self.text, "ratings": self.ratings})


def read_texts(path: Path) -> list[Text]:
    """The texts of a JSONL file or of the study's archive; newspaper editorials are left out."""
    texts = list(_archived(path) if path.name.endswith(".tar.gz") else _rows(path))
    return [t for t in texts if t.domain in (*SEEN, UNSEEN)]


def _rows(path: Path) -> Iterator[Text]:
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        yield Text(row["id"], row["domain"], row["text"], tuple(row["ratings"]))


def _archived(path: Path) -> Iterator[Text]:
    with tarfile.open(path) as archive:

        def lines(name: str) -> Iterator[list[str]]:
            member = archive.extractfile(f"hutto_ICWSM_2014/{name}.txt")
            assert member is not None
            for line in member.read().decode("utf-8-sig", "replace").splitlines():
                yield line.split("\t")

        for domain in (*SEEN, UNSEEN):
            texts = {number: _plain(text) for number, _, text, *_ in lines(f"{domain}_GroundTruth")}
            for number, _, _, ratings in lines(f"{domain}_anonDataRatings"):
                yield Text(f"{domain}-{number}", domain, texts[number], tuple(ast.literal_eval(ratings)))


def _plain(text: str) -> str:
    """With quotation marks as people type them."""
    return text.replace("''", '"').strip()


@dataclass(frozen=True, slots=True)
class Part:
    """N held-out texts; `known`, (N, N), is True for pairs of one domain whose mean ratings differ."""

    name: str
    texts: list[Text]
    means: np.ndarray
    known: np.ndarray
    resampled: np.ndarray
    """How often each text is in each of R resamples, (N, R)."""

    def right(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Whether each pair is ordered as people order it: 1, 0, or a half for equal scores."""
        return self.agreement(np.asarray(scores, dtype=float), self.means)

    def agreement(self, a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
        signs_NN = np.sign(a_N[:, None] - a_N) * np.sign(b_N[:, None] - b_N)
        return np.where(self.known, (1 + signs_NN) / 2, 0).astype(np.float32)

    def accuracy(self, right_NN: np.ndarray) -> np.ndarray:
        """Share of right pairs: of all texts first, then of every resample."""
        weights_NR = np.concatenate([np.ones((len(self.texts), 1), np.float32), self.resampled], axis=1)

        def pairs(matrix_NN: np.ndarray) -> np.ndarray:
            return np.einsum("nr,nr->r", weights_NR, matrix_NN @ weights_NR)

        return pairs(right_NN) / pairs(self.known.astype(np.float32))


def part(name: str, texts: list[Text]) -> Part:
    rng = np.random.default_rng(5)
    means_N, domains_N = np.array([t.mean for t in texts]), np.array([t.domain for t in texts])
    known_NN = (means_N[:, None] != means_N) & (domains_N[:, None] == domains_N)
    resampled_RN = rng.multinomial(len(texts), np.full(len(texts), 1 / len(texts)), RESAMPLES)
    return Part(name, texts, means_N, known_NN, resampled_RN.T.astype(np.float32))


def people(of: Part, size: Callable[[int], int]) -> np.ndarray:
    """How often so many raters of each text order a pair as its other raters do; mean over random divisions."""
    rng = np.random.default_rng(11)
    right_NN = np.zeros(of.known.shape, np.float32)
    for _ in range(HALVES):
        shuffled = [rng.permutation(t.ratings) for t in of.texts]
        some_N = np.array([r[: size(len(r))].mean() for r in shuffled])
        rest_N = np.array([r[size(len(r)) :].mean() for r in shuffled])
        right_NN += of.agreement(some_N, rest_N) / HALVES
    return right_NN


def vader(texts: Sequence[str]) -> list[float]:
    rules = SentimentIntensityAnalyzer()
    return [rules.polarity_scores(text)["compound"] for text in texts]


@torch.no_grad()
def batched(texts: Sequence[str], tokenizer: object, call: Callable[..., torch.Tensor]) -> np.ndarray:
    """`call` on all texts, those of like length together, in the order given."""
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    out: list[np.ndarray] = [np.empty(0)] * len(texts)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer(  # type: ignore[operator]
            [texts[k] for k in chosen], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        for k, row in zip(chosen, call(**batch).float().numpy(), strict=True):
            out[k] = row
    return np.stack(out)


def embeddings(texts: Sequence[str], folder: Path) -> torch.Tensor:
    """Mean-pooled embeddings of the frozen backbone, shape (N, D)."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def pooled(**batch: torch.Tensor) -> torch.Tensor:
        mask_BT1 = batch["attention_mask"][:, :, None].float()
        return (model(**batch).last_hidden_state * mask_BT1).sum(1) / mask_BT1.sum(1)

    return torch.tensor(batched(texts, tokenizer, pooled))


def linear_head(groups: list[VotedGroup], folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """A linear Bradley-Terry head on frozen embeddings, its ridge chosen on a tenth of the training groups."""
    texts = [c for g in groups for c in g.completions]
    x_ND = embeddings(texts, folder)
    centre_D, scale_D = x_ND.mean(0), x_ND.std(0)
    largest = max(len(g.completions) for g in groups)
    x_BGD, wins_BGG = torch.zeros(len(groups), largest, x_ND.shape[1]), torch.zeros(len(groups), largest, largest)
    for b, (g, x_GD) in enumerate(
        zip(groups, ((x_ND - centre_D) / scale_D).split([len(g.completions) for g in groups]), strict=True)
    ):
        x_BGD[b, : len(x_GD)], wins_BGG[b, : len(x_GD), : len(x_GD)] = x_GD, torch.tensor(g.wins.wins)
    tenth = len(groups) // 10

    def nll(weights_D: torch.Tensor, chosen: slice) -> torch.Tensor:
        scores_BG, wins = x_BGD[chosen] @ weights_D, wins_BGG[chosen]
        return (wins * F.softplus(scores_BG[:, None, :] - scores_BG[:, :, None])).sum() / wins.sum()

    def fit(ridge: float, chosen: slice) -> torch.Tensor:
        weights_D = torch.zeros(x_ND.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights_D], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nll(weights_D, chosen) + ridge * weights_D.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return weights_D.detach()

    tried = {ridge: float(nll(fit(ridge, slice(tenth, None)), slice(tenth))) for ridge in (1e-4, 1e-3, 1e-2, 1e-1)}
    best = min(tried, key=tried.__getitem__)
    weights_D = fit(best, slice(None))
    return lambda texts: (((embeddings(texts, folder) - centre_D) / scale_D) @ weights_D).numpy()


def train_ours(train: Path, heldout: Path, run: Path, settings: Sequence[str]) -> tuple[float, float]:
    """Run the recipe on these files; returns wall and processor seconds, start of the process included."""
    values = [f"train_rm.dataset={train}", f"train_rm.heldout={heldout}", *settings]
    command = [
        sys.executable,
        "-m",
        "rlhf_cli",
        "train-rm",
        str(RECIPE),
        "--run-dir",
        str(run),
        "--fresh",
        "--output",
        "plain",
    ]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *(word for value in values for word in ("--set", value))], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu_s


def ours(folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda texts: batched(texts, tokenizer, lambda **batch: model(**batch).logits[:, 0])


def calibration(of: Part, scores_N: np.ndarray, temperature: float) -> dict[str, object]:
    """Whether 70 % means 70 %: probabilities of the model against the shares of raters, over all pairs.

    The share for i over j: of all pairs of a rating of each, those where i is higher, ties half.
    """
    levels = np.arange(-4, 5)
    counts_NL = np.array([[t.ratings.count(level) for level in levels] for t in of.texts])
    share_NL = counts_NL / counts_NL.sum(1, keepdims=True)
    below_NL = share_NL.cumsum(1) - share_NL / 2
    shares_NN = share_NL @ below_NL.T
    chances_NN = 1 / (1 + np.exp(-(scores_N[:, None] - scores_N) / temperature))
    sure = of.known & (chances_NN >= 0.5)
    chances, shares = chances_NN[sure], shares_NN[sure]
    bins = np.minimum((chances * 20).astype(int) - 10, 9)
    each = []
    for k in range(10):
        inside = bins == k
        if inside.any():
            said, happened = float(chances[inside].mean()), float(shares[inside].mean())
            each.append({"said": said, "happened": happened, "pairs": int(inside.sum())})
    ece = sum(b["pairs"] * abs(b["said"] - b["happened"]) for b in each) / len(chances)
    return {"temperature": temperature, "ece": ece, "bins": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the study's archive, or a JSONL file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--run-dir", type=Path, help="keep the run there")
    parser.add_argument("--data-only", type=Path, metavar="FILE", help="only write the texts as JSONL")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write date, machine and results")
    args = parser.parse_args()
    texts = read_texts(args.data)
    if args.data_only:
        args.data_only.write_text("".join(t.row() + "\n" for t in texts), "utf-8")
        print(f"{len(texts)} texts in {args.data_only}")
        return
    torch.manual_seed(0)
    seen = [t for t in texts if t.domain in SEEN]
    train = sorted((t for t in seen if t.place >= 0.1), key=lambda t: t.place)[:MOST_TRAINING_TEXTS]
    unseen = sorted((t for t in texts if t.domain == UNSEEN), key=lambda t: t.place)[:MOST_HELD_OUT]
    known = {" ".join(t.text.casefold().split()) for t in train}
    new = [t for t in [*seen, *unseen] if " ".join(t.text.casefold().split()) not in known]
    parts = [
        part("domains seen", [t for t in new if t.domain in SEEN and t.place < 0.1]),
        part("product reviews, never seen", [t for t in new if t.domain == UNSEEN]),
    ]
    minilm = pull("minilm")
    with tempfile.TemporaryDirectory() as scratch:
        files = {"train": train, "heldout": parts[0].texts}
        for name, rows in files.items():
            (Path(scratch) / f"{name}.jsonl").write_text("".join(t.row() + "\n" for t in rows), "utf-8")
        run = args.run_dir or Path(scratch) / "run"
        paths = [Path(scratch) / f"{name}.jsonl" for name in files]
        wall_s, cpu_s = train_ours(paths[0], paths[1], run, args.set)
        start = time.perf_counter()
        linear = linear_head(read_voted_groups(paths[0]), minilm)
        linear_s = time.perf_counter() - start
        model = ours(run / "train_rm" / "model")
        report = json.loads((run / "train_rm" / "report.json").read_text("utf-8"))
        said = json.loads((run / "train_rm" / "model" / "reward_model.json").read_text("utf-8"))
    results = {p.name: judge(p, linear, model, float(said["temperature"])) for p in parts}
    print(
        f"\ntrained on {len(train)} texts; ours {wall_s / 60:.1f} minutes, {cpu_s / 60:.1f} of them of "
        f"a processor; linear head {linear_s:.0f} s"
    )
    for of in parts:
        print(f"\n{of.name}: {len(of.texts)} texts, {int(of.known.sum()) // 2} pairs")
        for name, (value, low, high) in results[of.name]["accuracy"].items():  # type: ignore[union-attr]
            print(f"  {name:44} {value:6.1%}  ({low:.1%} to {high:.1%})")
        print(f"  ECE of ours, against shares of raters: {results[of.name]['calibration']['ece']:.3f}")  # type: ignore[index]
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        write(
            args.json,
            {
                "recipe": RECIPE.name,
                "settings": args.set,
                "training_texts": len(train),
                "ours_wall_s": wall_s,
                "ours_cpu_s": cpu_s,
                "linear_wall_s": linear_s,
                "results": results,
                "report": report,
            },
        )


def judge(
    of: Part,
    linear: Callable[[Sequence[str]], np.ndarray],
    model: Callable[[Sequence[str]], np.ndarray],
    temperature: float,
) -> dict[str, object]:
    """Accuracy of everybody on the same pairs, with 95 % intervals, and the calibration of ours."""
    texts = [t.text for t in of.texts]
    scores_N = model(texts)
    right = {
        "VADER rules": of.right(vader(texts)),
        "linear head on frozen MiniLM": of.right(linear(texts)),
        "ours": of.right(scores_N),
        "one rater of each text against the others": people(of, lambda raters: 1),
        "half of the raters against the other half": people(of, lambda raters: raters // 2),
    }
    drawn = {name: of.accuracy(matrix) for name, matrix in right.items()}
    for name in ("VADER rules", "linear head on frozen MiniLM"):
        drawn[f"ours minus {name}"] = drawn["ours"] - drawn[name]
    accuracy = {
        name: [float(each[0]), *(float(q) for q in np.quantile(each[1:], (0.025, 0.975)))]
        for name, each in drawn.items()
    }
    pairs = int(of.known.sum()) // 2
    return {
        "texts": len(of.texts),
        "pairs": pairs,
        "accuracy": accuracy,
        "calibration": calibration(of, scores_N, temperature),
    }


if __name__ == "__main__":
    main()
