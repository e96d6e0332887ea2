"""What `rlhf sft` learns from, and what it reports: worked out by hand on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import MakeRecipe
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from rlhf_cli.errors import DataError, Diverged
from rlhf_cli.learner.checkpoints import Checkpoints, newest
from rlhf_cli.learner.early_stop import EarlyStop
from rlhf_cli.learner.sft import IGNORED, SftResult, encode_rows, train_sft
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.recipe.schema import Recipe, Sft, StopEarly
from rlhf_cli.types import Message

WORDS = ["river", "the sea", "light", "a very long way to go", "hello", "blue", "why", "water that flows"]
ROWS = [(Message("user", f"What is {word}?"), Message("assistant", f"It is {word[::-1]}.")) for word in WORDS]
Metrics = list[tuple[int, dict[str, float]]]


def trained(
    recipe: Recipe, folder: Path, rows: Any = ROWS, heldout: Any = (), path: str = ""
) -> tuple[SftResult, Metrics]:
    """Train and return what the learner says, and the metrics of each step."""
    seen: Metrics = []

    def on_row(step: int, row: Mapping[str, float]) -> None:
        seen.append((step, dict(row)))

    checkpoints = Checkpoints(folder / "checkpoints", "inputs", None, lambda: False, lambda _: None)
    assert recipe.model.path is not None
    result = train_sft(
        path or recipe.model.path, recipe, rows, heldout, folder / "model", checkpoints, None, lambda *_: None, on_row
    )
    return result, seen


def sft(recipe: MakeRecipe, **keys: Any) -> Recipe:
    base = {"dataset": "rows.jsonl", "learning_rate": 1e-3, "samples": 0, "batch_size": 8, "max_steps": 1}
    return recipe(sft={**base, **keys})


@pytest.mark.parametrize(("loss_on", "learned"), [("completion", "It is reviR.<|end|>"), ("all", None)])
def test_only_the_answer_is_learned_unless_all_is(tiny: str, loss_on: str, learned: str | None) -> None:
    tokenizer = load_tokenizer(tiny)
    section = Sft.model_validate({"dataset": "x.jsonl", "loss_on": loss_on})
    row = (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "It is reviR."))
    encoded = encode_rows(tokenizer, [row], section).dataset[0]
    text = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>It is reviR.<|end|>"
    assert tokenizer.decode(encoded["input_ids"]) == text
    kept = [label for label in encoded["labels"] if label != IGNORED]
    assert tokenizer.decode(kept) == (learned or text)
    assert encoded["labels"][-len(kept) :] == encoded["input_ids"][-len(kept) :]


def test_a_raw_text_is_learned_whole_and_ends(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    encoded = encode_rows(tokenizer, ["A river."], Sft.model_validate({"dataset": "x.jsonl"})).dataset[0]
    assert encoded["labels"] == encoded["input_ids"]
    assert tokenizer.decode(encoded["input_ids"]) == "A river.<|end|>"


def test_rows_that_do_not_fit_are_counted(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    section = Sft.model_validate({"dataset": "x.jsonl", "max_length": 40})
    long_answer = (Message("user", "Hi"), Message("assistant", "z" * 100))
    long_prompt = (Message("user", "z" * 100), Message("assistant", "Hi"))
    encoded = encode_rows(tokenizer, [ROWS[0], long_answer, long_prompt], section)
    assert (encoded.truncated, encoded.dropped, len(encoded.dataset)) == (2, 1, 2)
    assert len(encoded.dataset[1]["input_ids"]) == 40
    with pytest.raises(DataError, match="no row leaves room for its answer in the 40 tokens"):
        encode_rows(tokenizer, [long_prompt], section)


def nll(folder: str, rows: Any) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of the answers, each row alone, and their number."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for prompt, answer in rows:
        before = f"<|user|>{prompt.content}<|end|><|assistant|>"
        start = len(tokenizer(before)["input_ids"])
        ids_1T = torch.tensor([tokenizer(f"{before}{answer.content}<|end|>")["input_ids"]])
        with torch.no_grad():
            logps_1TV = model(ids_1T).logits.log_softmax(-1)
        total -= float(logps_1TV[0, :-1].gather(-1, ids_1T[0, 1:, None])[start - 1 :].sum())
        count += ids_1T.shape[1] - start
    return total, count


@pytest.mark.parametrize("keys", [{}, {"packing": True, "max_length": 96}, {"accumulate": 4, "batch_size": 2}])
def test_the_loss_is_the_mean_over_all_answer_tokens_of_a_step(
    tiny: str, recipe: MakeRecipe, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Packed or padded, in one batch or in four: no text sees another, and no token counts for more than another."""
    total, count = nll(tiny, ROWS)
    result, metrics = trained(sft(recipe, **keys), tmp_path)
    ((step, row),) = metrics
    assert step == 1
    assert row["sft/loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.figures["loss"] == row["sft/loss"]
    assert row["sft/tokens_per_s"] > 0
    plain = trained(sft(recipe), tmp_path / "plain")[1][0][1]
    assert row["sft/grad_norm"] == pytest.approx(plain["sft/grad_norm"], rel=1e-4)


def test_the_held_out_loss_is_the_mean_over_tokens(tiny: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    total, count = nll(tiny, ROWS[:5])
    result, _ = trained(sft(recipe, batch_size=2), tmp_path, heldout=ROWS[:5])
    assert result.figures["heldout_loss_before"] == pytest.approx(total / count, rel=1e-5)
    after, _ = nll(str(tmp_path / "model"), ROWS[:5])
    assert result.figures["heldout_loss"] == pytest.approx(after / count, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(
    recipe: MakeRecipe, tmp_path: Path, schedule: str, rates: list[float]
) -> None:
    chosen = sft(recipe, max_steps=6, warmup_ratio=1 / 3, schedule=schedule)
    seen = [row["sft/learning_rate"] for _, row in trained(chosen, tmp_path)[1]]
    assert seen == pytest.approx([rate * 1e-3 for rate in rates], abs=1e-9)


def test_the_best_weights_are_kept_where_it_stops_early(tiny: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    """Held-out answers that contradict the training data soon get worse."""
    against = [(asked, Message("assistant", "Nobody knows.")) for asked, _ in ROWS]
    stop = {"every": 1, "patience": 2}
    chosen = sft(recipe, heldout="x.jsonl", max_steps=40, learning_rate=5e-3, stop_early=stop, schedule="constant")
    result, metrics = trained(chosen, tmp_path, heldout=against)
    looks = {step: row["sft/heldout_loss"] for step, row in metrics}
    best = min(looks, key=looks.__getitem__)
    assert result.figures["best_step"] == best
    assert result.figures["steps"] == best + 2 == max(looks)
    assert result.figures["heldout_loss"] == pytest.approx(looks[best], rel=1e-6)
    total, count = nll(str(tmp_path / "model"), against)
    assert total / count == pytest.approx(looks[best], rel=1e-5)


def test_answers_before_and_after_stand_beside_those_of_the_data(recipe: MakeRecipe, tmp_path: Path) -> None:
    chosen = sft(recipe, max_steps=150, learning_rate=1e-2, samples=2, schedule="constant", warmup_ratio=0)
    rows = [(Message("user", "Say hello."), Message("assistant", "Hi!"))] * 8
    first, second = trained(chosen, tmp_path, rows=rows)[0].samples
    assert first == second
    assert (first["prompt"], first["answer"], first["after"]) == ("Say hello.", "Hi!", "Hi!")
    assert first["before"] != "Hi!"
    texts = trained(sft(recipe, samples=1), tmp_path / "text", rows=["A story of a river."] * 3)[0].samples
    assert (texts[0]["prompt"], texts[0]["answer"]) == ("", "A story of a river.")


def test_weights_outside_what_the_recipe_trains_stay_as_they_are(tiny: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    chosen = recipe(model={"last_layers": 1}, sft={"dataset": "x.jsonl", "max_steps": 2, "learning_rate": 1e-2})
    trained(chosen, tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(".layers.1." in name or name == "model.norm.weight" for name in changed)


def test_a_gradient_that_is_no_number_changes_no_weight(tiny: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(broken)
    with pytest.raises(Diverged, match=r"gradient of step 1 is not finite.*\n?.*Lower sft.learning_rate"):
        trained(sft(recipe), tmp_path, path=str(broken))


def test_only_whole_checkpoints_of_the_same_inputs_are_found(tmp_path: Path) -> None:
    """Whatever a killed process leaves under other names is no checkpoint."""
    assert newest(tmp_path, "a") is None
    (tmp_path / ".partial" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / ".partial" / "old-step-000008").mkdir()
    assert newest(tmp_path, "a") is None
    for step, inputs in ((4, "a"), (12, "a"), (16, "b")):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / "rlhf.json").write_text(f'{{"inputs": "{inputs}", "step": {step}, "finished": false}}')
    found = newest(tmp_path, "a")
    assert found is not None
    assert (found.step, found.path.name) == (12, "step-000012")
    assert newest(tmp_path, "c") is None


def test_a_held_out_loss_that_is_no_number_is_never_the_best() -> None:
    state, control = TrainerState(global_step=1, max_steps=9), TrainerControl()
    stop = EarlyStop(StopEarly(every=1, patience=2), torch.nn.Linear(1, 1), lambda: float("nan"))
    with pytest.raises(Diverged, match="held-out loss after step 1 is nan"):
        stop.on_step_end(TrainingArguments(use_cpu=True), state, control)
    assert not stop.looks
