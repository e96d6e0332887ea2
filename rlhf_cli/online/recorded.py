"""The loop of a recorded run, taken again: the same groups in the same steps, without waiting for anybody."""

from __future__ import annotations

from typing import Any

from rlhf_cli.errors import FlowRefused
from rlhf_cli.feedback.recorded import Recording
from rlhf_cli.online.stream import Stream
from rlhf_cli.types import RankedGroup


class RecordedStream(Stream):
    """Samples and trains when the recording did, whatever the time that votes took then.

    With the recipe, seed, versions and machine of the recording every completion is the same, so every step is, and so
    are the final weights. Where something differs, groups are set aside and the replay ends at the first step that has
    none left: what people said about other completions is no label for these.

    Raises:
        DataError: The recording ends before `run_online.steps`, or does not say which groups were sampled together.
    """

    def __init__(self, recording: Recording, **given: Any) -> None:
        super().__init__(**given)
        self._recorded_steps = recording.steps_for(self.online.steps)
        self._batches, self._steps = recording.batches, recording.state.steps
        self._why: str | None = None
        """Of the first group without votes."""

    def _next_groups(self) -> list[RankedGroup]:
        for batch in self._batches:
            missing = batch.first + batch.count - self.next_index
            if batch.policy_step == self.step and missing > 0:
                self.stop.check()
                self.next_index = max(self.next_index, batch.first)  # a roll-back of the recording left some out
                self._sample(min(missing, batch.count))
        self.stop.check()
        self._collect()
        wanted = self._recorded_steps[self.step + 1]
        ready = {ranked.group.index: ranked for ranked in self.ready}
        taken = [ready[index] for index in wanted if index in ready]
        if not taken:
            why = self._why or "they were set aside earlier"
            raise FlowRefused(
                f"none of the groups that step {self.step + 1} of the recording trained on is here: {why}. "
                "A replay needs the recipe, seed, versions and machine of its recording."
            )
        self.ready.clear()
        self.ready.extend(ranked for index, ranked in ready.items() if index not in wanted)
        return taken

    def _beta(self) -> float:
        return self._steps[self.step + 1].beta or super()._beta()

    def _heed_guards(self) -> None:
        """The recording holds the steps that stood, whatever its guards did."""

    def _check_hopeless(self, in_a_row: int, reason: str) -> None:
        # A step without groups ends the replay, not a row of groups without votes.
        self._why = self._why or reason
