"""metrics.jsonl: one object per step, under the metric names that scripts and trackers see."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.journal.observe import Observer


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown; `form` is a format specification such as `.2f`."""

    label: str
    unit: str
    help: str
    form: str


METRICS: dict[str, Metric] = {
    "sft/loss": Metric("loss", "nats", "Supervised: negative log-likelihood, per token.", ".3f"),
    "sft/heldout_loss": Metric("held-out loss", "nats", "The same on texts that were not trained on.", ".3f"),
    "sft/accuracy": Metric("accuracy", "", "Share of tokens that the model would have chosen.", ".3f"),
    "sft/grad_norm": Metric("gradient norm", "", "Norm of the gradient before clipping.", ".3f"),
    "sft/learning_rate": Metric("learning rate", "", "Step size of the optimiser.", ".2e"),
    "sft/tokens_per_s": Metric("tokens per second", "tokens", "Trained on, padding not counted.", ".0f"),
    "sft/step_s": Metric("step", "s", "Wall time of the step.", ".2f"),
    "train_rm/loss": Metric("loss", "nats", "Reward model: negative log-likelihood and centring, per vote.", ".3f"),
    "train_rm/heldout_loss": Metric("held-out loss", "nats", "Negative log-likelihood per held-out vote.", ".3f"),
    "train_rm/accuracy": Metric("accuracy", "", "Share of the step's votes whose winner has the higher reward.", ".3f"),
    "train_rm/grad_norm": Metric("gradient norm", "", "Norm of the gradient before clipping.", ".3f"),
    "train_rm/learning_rate": Metric("learning rate", "", "Step size of the optimiser.", ".2e"),
    "train_rm/step_s": Metric("step", "s", "Wall time of the step.", ".2f"),
    "reward/mean": Metric("reward", "", "Mean score of freshly sampled completions.", ".3f"),
    "reward/length_controlled": Metric(
        "reward at equal length", "", "What it would be at the length of the first step, by the slope in groups.", ".3f"
    ),
    "reward/std": Metric("reward spread", "", "Standard deviation of that score.", ".3f"),
    "kl/sequence_nats": Metric("KL", "nats", "KL from the reference, per completion.", ".2f"),
    "kl/token_nats": Metric("KL per token", "nats", "KL from the reference, per token.", ".4f"),
    "train/loss": Metric("loss", "nats", "Of the learner: with dpo, the negative log-likelihood per vote.", ".4f"),
    "train/accuracy": Metric("agreement", "", "Share of votes that the policy's implicit reward agrees with.", ".3f"),
    "train/margin": Metric("margin", "", "Implicit reward of the preferred completion above the other.", ".4f"),
    "train/grad_norm": Metric("gradient norm", "", "Norm of the gradient before clipping.", ".3f"),
    "train/learning_rate": Metric("learning rate", "", "Step size of the optimiser.", ".2e"),
    "train/beta": Metric("beta", "", "How strongly the policy is held to the reference.", ".3f"),
    "train/entropy_nats": Metric("entropy", "nats", "Of the policy's choice of a token, mean.", ".3f"),
    "train/marked_frac": Metric("marked", "", "Share of trained completions in which raters marked something.", ".2f"),
    "train/ratio_mean": Metric("ratio", "", "Probability of a token against when it was sampled, mean.", ".3f"),
    "train/clip_frac": Metric("clipped", "", "Share of tokens that had moved too far to count.", ".3f"),
    "train/kl_token_nats": Metric("KL of training", "nats", "KL from the reference, per token that trained.", ".4f"),
    "train/policy_loss": Metric("policy loss", "", "PPO: the clipped surrogate, per token.", ".4f"),
    "train/value_loss": Metric("value loss", "", "PPO: half the squared error of the critic, per token.", ".4f"),
    "train/value_clip_frac": Metric("values clipped", "", "PPO: share of values that had moved too far.", ".3f"),
    "train/value_explained": Metric("foreseen", "", "PPO: variance of the returns that the critic foresaw.", ".3f"),
    "train/value_grad_norm": Metric("critic's gradient", "", "PPO: its norm before clipping.", ".3f"),
    "train/score": Metric("trained score", "", "PPO: mean score of the completions that trained.", ".3f"),
    "length/mean_tokens": Metric("length", "tokens", "Mean length of sampled completions.", ".1f"),
    "length/mean_chars": Metric("length", "characters", "Mean length of sampled completions.", ".0f"),
    "length/reward_correlation": Metric(
        "length in the score", "", "Correlation of score and length within groups, as the learner sees scores.", ".2f"
    ),
    "length/ended_frac": Metric("ended", "", "Share of completions that ended by themselves.", ".2f"),
    "sampling/degenerate_total": Metric(
        "degenerate", "groups", "Set aside unasked: completions all empty, all the same, or all cut off.", ".0f"
    ),
    "staleness/mean_steps": Metric("staleness", "steps", "Age of the policy that sampled what trained, mean.", ".2f"),
    "staleness/max_steps": Metric("staleness, oldest", "steps", "Age of the oldest group that trained.", ".0f"),
    "flow/in_flight": Metric("in flight", "groups", "Groups that people are voting on.", ".0f"),
    "flow/votes_total": Metric("votes, total", "votes", "Votes received since the start.", ".0f"),
    "flow/votes_step": Metric("votes", "votes", "Votes behind this step.", ".0f"),
    "flow/votes_per_group": Metric(
        "votes per group", "votes", "Mean votes per group of this step that people saw.", ".1f"
    ),
    "flow/incomplete_frac": Metric("incomplete", "", "Share of groups that ended below the minimum of votes.", ".2f"),
    "flow/set_aside_total": Metric("set aside", "groups", "Groups that will never train, each with a reason.", ".0f"),
    "flow/backlog": Metric("backlog", "groups", "Groups waiting for their item to be made.", ".0f"),
    "flow/late_votes_total": Metric("late votes", "votes", "Votes that came after their group was decided.", ".0f"),
    "flow/votes_saved_total": Metric("votes saved", "votes", "Short of desired, as the ranking was decided.", ".0f"),
    "flow/doubles_total": Metric("doubles", "", "Times that the service made two items of one dataset.", ".0f"),
    "flow/orphans_total": Metric("orphans", "items", "Items found that the journal did not know.", ".0f"),
    "flow/latency_p50_s": Metric("latency p50", "s", "Median time from asking to the answer.", ".2f"),
    "flow/latency_p95_s": Metric("latency p95", "s", "95th percentile of that time.", ".2f"),
    "flow/votes_per_min": Metric("votes per minute", "votes", "Rate at which votes arrive.", ".0f"),
    "flow/min_votes": Metric("minimum", "votes", "Votes a group needs to be complete.", ".0f"),
    "flow/desired_votes": Metric("desired", "votes", "Votes a group should get.", ".0f"),
    "flow/max_votes": Metric("maximum", "votes", "Votes a group can get at most.", ".0f"),
    "flow/circuit_open": Metric(
        "circuit open", "", "1 while the service does not answer and one call at a time asks.", ".0f"
    ),
    "flow/unreachable_s": Metric(
        "unreachable", "s", "Time since the service stopped to answer; 0 while it does.", ".0f"
    ),
    "flow/requests_total": Metric("requests", "requests", "Requests sent to the service.", ".0f"),
    "flow/retries_total": Metric("retries", "requests", "Attempts of calls after their first.", ".0f"),
    "function/calls_total": Metric("calls", "", "Calls of your function or endpoint in this process.", ".0f"),
    "function/score_mean": Metric("score", "", "Mean of your scores in the latest 64 groups.", ".3f"),
    "judge/requests_total": Metric("requests", "", "Sent to the judge by this process, repetitions included.", ".0f"),
    "judge/usd": Metric("judge's cost", "USD", "Of all its answers in this run folder.", ".4f"),
    "judge/usd_per_group": Metric("per group", "USD", "Mean cost of a group, answers from disk included.", ".5f"),
    "judge/position_bias": Metric("position bias", "", "Share of verdicts for what is shown first, less half.", "+.3f"),
    "judge/inconsistent_frac": Metric("inconsistent", "", "Share of pairs whose two orders contradict.", ".2f"),
    "judge/unusable_frac": Metric("unusable", "", "Share of questions without a usable answer.", ".3f"),
    "judge/cached_frac": Metric("from disk", "", "Share of questions answered before, and not paid again.", ".2f"),
    "selection/people_total": Metric("seen by people", "groups", "Groups that people were asked about.", ".0f"),
    "selection/random_total": Metric("drawn at random", "groups", "Those of them that were drawn blindly.", ".0f"),
    "selection/people_frac": Metric("share for people", "", "Share of all groups that people were asked about.", ".2f"),
    "drift/z_max": Metric("drift", "standard errors", "Rise of disagreement in the cluster where it rose most.", ".1f"),
    "drift/cluster_worst": Metric("drifting cluster", "", "The cluster where it rose most.", ".0f"),
    "drift/rounds_total": Metric("targeted rounds", "", "Times that a drifting cluster was looked into.", ".0f"),
    "drift/round_groups": Metric("groups of a round", "groups", "Still to come back in targeted rounds.", ".0f"),
    "rm/agreement": Metric(
        "agreement", "", "Share of people's latest votes that the reward model had said before.", ".3f"
    ),
    "rm/agreement_random": Metric(
        "agreement, unbiased", "", "The same of the groups that were drawn at random: holds for all groups.", ".3f"
    ),
    "rm/version": Metric("version", "", "Of the reward model; counts refits that were published.", ".0f"),
    "rm/heldout_accuracy": Metric(
        "held-out accuracy",
        "",
        "Share of fresh votes, kept from the latest refit, that the version agrees with.",
        ".3f",
    ),
    "rm/replay_groups": Metric("replay store", "groups", "People's groups that a refit learns from.", ".0f"),
    "time/step_s": Metric("step", "s", "Wall time of the step.", ".2f"),
    "time/generate_s": Metric("generate", "s", "Sampling completions.", ".2f"),
    "time/best_of_s": Metric("choosing", "s", "Scoring candidates of roles that keep the best of several.", ".2f"),
    "time/reference_s": Metric("reference", "s", "Log-probabilities under policy and reference.", ".2f"),
    "time/wait_s": Metric("wait", "s", "Waiting for votes.", ".2f"),
    "time/train_s": Metric("train", "s", "Learner update.", ".2f"),
    "time/sync_s": Metric("sync", "s", "Copying weights to the generator.", ".2f"),
    "cost/usd": Metric("cost", "USD", "Spent on votes and on a judge.", ".2f"),
    "run/steps_total": Metric("steps", "steps", "Steps planned.", ".0f"),
}

ROLE_METRICS: dict[str, Metric] = {
    "reward": Metric("reward", "", "Mean score of what the role sampled since the last step.", ".3f"),
    "length_tokens": Metric("length", "tokens", "Mean length of the same.", ".1f"),
    "win_frac": Metric("won", "", "Of the step's votes between this role and another, the share it won.", ".3f"),
}
"""Of every role that a recipe names, under `role/<name>/...`."""


class MetricsWriter:
    """Appends rows to metrics.jsonl and shows them. A lost row is only a gap in a chart, so there is no fsync."""

    def __init__(self, path: Path, observers: Sequence[Observer] = ()) -> None:
        self.path = path
        self._observers = tuple(observers)
        if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            with path.open("ab") as out:  # a crash left half a row: the next one must not be glued to it
                out.write(b"\n")

    def append(self, step: int, row: Mapping[str, float]) -> None:
        """Write the row of `step`; what a repeated step measures replaces what it measured before, for readers.

        Values that are not finite become null: JSON has no NaN, and a gap is what they are.
        """
        values = {name: float(value) if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps({"step": step, "at": time.time(), **values}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
        for observer in self._observers:
            observer.on_metrics(step, row)

    def void_after(self, step: int) -> None:
        """Take back the rows of later steps, for readers; what was written stays in the file."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"void_after": step, "at": time.time()}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows by step, ascending; half-written lines and rows that were taken back are skipped. Empty without a file.

    Of a repeated step the last figure of each name wins: a step that is trained again after a crash samples nothing, so
    what was sampled for it is only in its first row.
    """
    rows: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:  # also bytes that are no UTF-8
                continue
            if not isinstance(row, dict):
                continue
            if isinstance(row.get("void_after"), int):
                rows = {step: kept for step, kept in rows.items() if step <= row["void_after"]}
            elif isinstance(row.get("step"), int):
                rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]
