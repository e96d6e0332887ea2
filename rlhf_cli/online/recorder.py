"""After every learner step: the journal first, then metrics and checkpoint."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_cli.journal.events import CheckpointSaved, StepTrained
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.metrics import MetricsWriter
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.learner.online import OnlineLearner
from rlhf_cli.learner.watch import check_gradients
from rlhf_cli.online.checkpoint import publish
from rlhf_cli.online.guards import Guards
from rlhf_cli.online.roles import role_metrics
from rlhf_cli.online.stream import Fresh, Stream
from rlhf_cli.types import RankedGroup


class Recorder(TrainerCallback):
    """Writes down what a step trained on, what it measured, and when its checkpoint is whole."""

    def __init__(
        self,
        run: RunDir,
        journal: Journal,
        metrics: MetricsWriter,
        stream: Stream,
        consumed: dict[int, tuple[str, ...]],
    ) -> None:
        self.run, self.journal, self.metrics, self.stream = run, journal, metrics, stream
        self.consumed = consumed
        self.learner: OnlineLearner | None = None
        self.last_saved = max(consumed, default=0)
        self._step_started = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._train_started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        advice = "Lower run_online.learner.learning_rate and start over with --fresh."
        check_gradients(kwargs["model"], state.global_step + 1, advice)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        batch = self.stream.batch
        assert batch is not None
        group_ids = tuple(g.group.id for g in batch.groups)
        self.consumed[state.global_step] = group_ids
        self.journal.append(StepTrained(step=state.global_step, group_ids=group_ids, beta=batch.beta))
        self.stream.step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # the summary after the last step is no step
            return
        self.metrics.append(state.global_step, self._row(logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        keep = self.stream.online.keep_checkpoints
        path = publish(self.run, state.global_step, self.consumed, keep)
        self.last_saved = state.global_step
        self.journal.append(CheckpointSaved(step=state.global_step, path=str(path.relative_to(self.run.path))))

    def _row(self, logs: dict[str, float]) -> dict[str, float]:
        stream, learner, batch = self.stream, self.learner, self.stream.batch
        assert learner is not None
        assert batch is not None
        now = time.perf_counter()
        spent = stream.policy.phase.lap()
        ages = [stream.step - 1 - g.group.policy_step for g in batch.groups]
        status = stream.feedback.status()
        row = {
            "train/loss": logs["loss"],
            "train/grad_norm": logs["grad_norm"],
            "train/learning_rate": logs["learning_rate"],
            **learner.step_metrics,
            **_fresh(stream.fresh, stream.guards),
            **(role_metrics(stream.fresh.roles, batch.groups) if stream.online.sampling.roles else {}),
            "sampling/degenerate_total": float(stream.unasked),
            "staleness/mean_steps": statistics.fmean(ages),
            "staleness/max_steps": float(max(ages)),
            **status,
            **(_votes(batch.groups) if stream.online.asks_people else {}),
            "cost/usd": stream.usd(),
            "time/step_s": now - self._step_started,
            "time/generate_s": spent.get("generate", 0.0),
            "time/best_of_s": spent.get("best_of", 0.0),
            "time/reference_s": spent.get("reference", 0.0),
            "time/sync_s": spent.get("sync", 0.0),
            "time/wait_s": spent.get("wait", 0.0),
            "time/train_s": now - self._train_started,
        }
        stream.fresh = Fresh()
        self._step_started = now
        return row


def _votes(groups: Sequence[RankedGroup]) -> dict[str, float]:
    """People's votes behind a step; their mean is over the groups that people saw."""
    votes = [g.votes_paid for g in groups if g.votes_paid]
    return {"flow/votes_step": sum(votes)} | ({"flow/votes_per_group": statistics.fmean(votes)} if votes else {})


def _fresh(fresh: Fresh, guards: Guards) -> dict[str, float]:
    """Figures of the completions sampled since the last step; empty where none were."""
    if not fresh.kl_nats:
        return {}
    row = {
        "kl/sequence_nats": statistics.fmean(fresh.kl_nats),
        "kl/token_nats": sum(fresh.kl_nats) / max(1, sum(fresh.tokens)),
        "length/mean_tokens": statistics.fmean(fresh.tokens),
        "length/mean_chars": statistics.fmean(fresh.chars),
        "length/ended_frac": statistics.fmean(fresh.ended),
    }
    if (correlation := guards.correlation) is not None:
        row["length/reward_correlation"] = correlation
    if fresh.rewards:
        row["reward/mean"] = statistics.fmean(fresh.rewards)
        row["reward/std"] = statistics.pstdev(fresh.rewards)
        if (controlled := guards.length_controlled(row["reward/mean"], row["length/mean_chars"])) is not None:
            row["reward/length_controlled"] = controlled
    return row
