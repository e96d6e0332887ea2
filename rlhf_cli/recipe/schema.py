"""Every section and key of a recipe: its type, bounds, default and meaning, once; `docs/recipes.md` is made from it.

Section names are command names. A section given with only its required keys is a vetted setting. What `run_online`
holds is in `recipe/online.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.recipe.kinds import (
    DataFile,
    Duration,
    EnvironmentName,
    NotYet,
    Section,
    Service,
    Share,
    Source,
    in_order,
    more_than_one,
    one_of,
    problem,
)
from rlhf_cli.recipe.online import RunOnline


class Lora(Section):
    """Train low-rank adapters on all linear layers instead of the weights themselves."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of the adapters."""
    alpha: int | None = Field(None, ge=1)
    """Scale of the adapters; twice the rank when left out."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of adapter inputs dropped in `sft`; reward model and online training go without dropout."""


class FromScratch(Section):
    """Build a tiny model from the texts of `sft`, for tests: its weights start random and its answers are a toy's."""

    layers: int = Field(2, ge=1, le=16)
    """Transformer layers."""
    hidden: int = Field(64, ge=8, le=1024)
    """Width of the hidden state; a multiple of `heads`."""
    heads: int = Field(4, ge=1, le=64)
    """Attention heads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden % self.heads:
            raise problem(f"hidden ({self.hidden}) is not a multiple of heads ({self.heads})", "hidden", "heads")
        return self


class Model(Section):
    """The model to improve, and which of its weights are trained."""

    path: str | None = Field(None, min_length=1)
    """A packaged model (`rlhf models ls`), a local folder, or a hub id; left out only with `from_scratch`."""
    lora: Lora | None = None
    """Train adapters; leave out to train the weights themselves."""
    last_layers: int | None = Field(None, ge=1)
    """Train only the last so many transformer layers; leave out to train all of them."""
    from_scratch: FromScratch | None = None
    """Build a tiny model instead of loading one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora is not None and self.last_layers is not None:
            raise problem(
                "last_layers and lora exclude each other: train either layers or adapters", "last_layers", "lora"
            )
        if self.path is not None and self.from_scratch is not None:
            raise problem("from_scratch and path exclude each other: build a model or load one", "from_scratch", "path")
        if self.path is None and self.from_scratch is None:
            raise problem("missing key 'path': a packaged model, a local folder or a hub id", "path")
        return self


class Data(Section):
    """What the policy is asked while it is trained and while it is measured."""

    prompts: DataFile
    """JSONL, one `{"prompt": text or messages}` a line: what the policy answers in `run_online`."""
    heldout_prompts: DataFile | None = None
    """The same, kept apart for `eval`."""
    system_prompt: str | None = Field(None, min_length=1, max_length=10_000)
    """Put before every prompt that has no system message of its own; raters do not see it."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longest prompt in tokens, chat template included; a longer one is an error, never cut."""


class StopEarly(Section):
    """Stop where held-out data no longer get better; the best weights seen are kept."""

    every: int = Field(20, ge=1)
    """Steps between two looks at the held-out data."""
    patience: int = Field(3, ge=1)
    """Looks in a row without a lower loss before it stops."""


class Part(Section):
    """A source of rows and how much of it goes into a mixture."""

    source: Source
    """A `.jsonl`, `.csv` or `.parquet` file, or a hub id `org/name[:split]`."""
    weight: float = Field(1.0, gt=0)
    """Share of the rows, beside the weights of the other parts; no row is used twice in an epoch."""


class Sft(Section):
    """Supervised fine-tuning: the model that online training starts from and is compared with."""

    dataset: Source | list[Part]
    """Rows of `{"messages"}`, `{"prompt", "completion"}` or `{"text"}`: a file, a hub id, or a list of them with
    weights."""
    heldout: Share | Source | None = None
    """The same, for the loss on texts that were not trained on; a number takes that share of the prompts of
    `dataset`."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, whatever `epochs` says."""
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after warming up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    batch_size: int = Field(8, ge=1)
    """Conversations at once; with `packing`, rows of `max_length` tokens."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one step; the same as a batch so many times as large, in less memory."""
    max_grad_norm: float = Field(1.0, gt=0)
    """A longer gradient is scaled down to this length."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_length: int = Field(1024, ge=8)
    """Longest conversation in tokens; the rest is cut off, and the rows that this happened to are counted."""
    packing: bool = False
    """Put several conversations into one row of `max_length` tokens, so that none is spent on padding; each attends to
    itself only."""
    loss_on: Literal["completion", "all"] = "completion"
    """`completion` learns the last turn of the assistant, `all` every token; a raw text is learned whole."""
    stop_early: StopEarly | None = None
    """Needs `heldout`."""
    samples: int = Field(4, ge=0, le=100)
    """Prompts answered before and after, in `samples/sft.jsonl` and in the report: the first held-out ones, else the
    first of the data."""
    checkpoint_every: int | None = Field(100, ge=1)
    """Steps between two checkpoints that an interrupted training goes on from, of which the newest is kept; with `null`
    a killed training starts over, and only a signal saves."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.dataset, list) and not self.dataset:
            raise problem("an empty list: name at least one source", "dataset")
        if self.stop_early is not None and self.heldout is None:
            raise problem("stop_early needs `heldout`: texts that were not trained on", "stop_early")
        return self


class TrainRm(Section):
    """A reward model, fitted to all votes of the data with the Bradley-Terry likelihood."""

    dataset: Source | list[Part] | None = None
    """Votes: rows of `{"prompt", "chosen", "rejected"}`, `{"prompt", "completions", "wins"}` or, by rater,
    `{"prompt", "completions", "votes"}`, or of rated texts, `{"text", "ratings"}`; a file, a hub id, or a list of them
    with weights. Needed unless `votes` is given."""
    votes: DataFile | None = None
    """A run folder whose own votes are trained on, alone or beside `dataset`."""
    heldout: Share | Source | None = None
    """The same, for the report on votes that were not trained on; a number takes that share of the prompts of
    `dataset` and `votes`."""
    model: str | None = Field(None, min_length=1)
    """The backbone, as in `model.path`; what the run itself starts from when left out. An encoder such as `minilm`
    will do."""
    kind: Literal["bradley_terry", "pairwise"] = "bradley_terry"
    """`bradley_terry` scores one completion at a time; `pairwise` reads prompt and both completions, in both orders."""
    ensemble: int | None = Field(None, ge=2, le=100)
    """So many small heads on one backbone, each on its own bootstrap of the votes: their mean is the reward, their
    spread says how sure it is. Only with `bradley_terry`."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, whatever `epochs` says."""
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after warming up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    batch_size: int = Field(8, ge=1)
    """Groups at once; with `pairwise`, pairs of completions."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one step; the same as a batch so many times as large, in less memory."""
    max_grad_norm: float = Field(1.0, gt=0)
    """A longer gradient is scaled down to this length."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of hidden units dropped while training, wherever the backbone has a place for it."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt and completion in tokens. What is longer loses the start of its prompt, then that of its
    completion, and is counted in the result."""
    centering: float = Field(0.01, ge=0)
    """Weight in the loss of the squared sum of the two rewards of a vote, as TRL's `center_rewards_coefficient`: keeps
    rewards near zero. Without effect on `pairwise`."""
    checkpoint_every: int | None = Field(100, ge=1)
    """Steps between two checkpoints that an interrupted training goes on from, of which the newest is kept; with `null`
    a killed training starts over, and only a signal saves."""
    stop_early: StopEarly | None = None
    """Needs `heldout`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dataset is None and self.votes is None:
            raise problem("missing key 'dataset': a file of votes; or `votes`, a run folder", "dataset")
        if self.kind == "pairwise" and self.ensemble is not None:
            raise problem("an ensemble is of heads that score one completion: only with bradley_terry", "ensemble")
        if self.stop_early is not None and self.heldout is None:
            raise problem("stop_early needs `heldout`: data that were not trained on", "stop_early")
        return self


class Responses(Section):
    """How many votes a group gets."""

    min: int = Field(8, ge=1)
    """Below this at the end of the time to live, the group is incomplete."""
    desired: int = Field(12, ge=1)
    """Enough: the service may stop asking here."""
    max: int = Field(16, ge=1)
    """Never more than this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "min", "desired", "max")
        return self


class Latency(Section):
    """How long simulated raters take for a vote."""

    p50: float = Field(2.0, ge=0)
    """Seconds that half of the votes stay under."""
    p95: float = Field(8.0, ge=0)
    """Seconds that 95 of 100 votes stay under."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "p50", "p95")
        return self


class Crowd(Section):
    """Simulated raters for the embedded service. They see what a person would see and vote over HTTP."""

    raters: int = Field(40, ge=1, le=10_000)
    """How many there are."""
    taste: Literal["kind", "brief", "letters"] = "kind"
    """What they like: a kind tone that keeps to the topic, brevity, or, for toys, vowels."""
    latency_s: Latency = Field(default_factory=Latency)
    """How long they take for a vote."""
    agreement: float = Field(0.72, ge=0.5, le=1)
    """Share of votes that agree with the taste on an average pair."""
    position_bias: float = Field(0.0, ge=-5, le=5)
    """Added to the log-odds of the completion shown on the left."""
    dropout: float = Field(0.02, ge=0, lt=1)
    """Share of tasks that a rater takes and never answers."""
    marks: float = Field(0.0, ge=0, le=1)
    """Share of votes with which a rater marks what it likes and dislikes most, where `run_online.segments` is set."""


class Flow(Section):
    """Where people vote, and on what terms. One group of completions is one item of the flow."""

    service: Service
    """`embedded` (a server inside the run, with simulated raters), `rapidata`, the address of a flow server, or
    `replay` (nobody is asked: votes come from the run folder in `recording`)."""
    recording: DataFile | None = None
    """Run folder whose votes `replay` gives again, to the same completions; only with `replay`, and needed there."""
    instruction: str = Field(min_length=1, max_length=2000)
    """The question that a rater answers about two completions."""
    responses: Responses = Field(default_factory=Responses)
    """How many votes a group gets."""
    ttl_s: float = Field(300.0, ge=10, le=3600)
    """Time to live of an item, in seconds on the service's clock; at least 60 with `rapidata`."""
    stop_when_decided: float | None = Field(None, gt=0.5, lt=1)
    """End an item early, after `responses.min` votes, once its best completion is the best with this probability."""
    settle_s: float = Field(10.0, ge=0, le=600)
    """How long a new item may take to show up in the service's list; waited before buying again after a doubt."""
    poll_s: float = Field(1.0, gt=0, le=60)
    """Time between two looks at the service."""
    outage_s: float = Field(600.0, gt=0, le=86400)
    """How long a run waits for a service that does not answer, in seconds, before it stops with exit code 75."""
    crowd: Crowd | None = None
    """Simulated raters; only with `embedded`, and needed there. With `replay`: who voted in the recording."""
    token_env: EnvironmentName | None = None
    """Name of the environment variable that holds the access token."""
    client_id_env: EnvironmentName | None = None
    """Name of the environment variable that holds the client id; RAPIDATA_CLIENT_ID when left out."""
    client_secret_env: EnvironmentName | None = None
    """Name of the environment variable that holds the client secret; RAPIDATA_CLIENT_SECRET when left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.service == "rapidata" and self.ttl_s < 60:
            # 20 s more than the 40 s before an item's end in which the service asks nobody new.
            raise problem(f"ttl_s ({self.ttl_s}) is below the 60 s that rapidata takes", "ttl_s", "service")
        if self.service == "rapidata" and self.stop_when_decided is not None:
            raise problem(
                "needs votes while they come in, rapidata shows none before an item's end; leave it out",
                "stop_when_decided",
            )
        if self.service == "embedded" and self.crowd is None:
            raise problem(
                "the embedded service needs simulated raters in this version; add `crowd: {}`, or give the address "
                "of a server where people vote",
                "service",
                "crowd",
            )
        if self.service == "replay" and self.recording is None:
            raise problem("replay needs `recording`: the run folder whose votes are to be given again", "service")
        if self.service != "replay" and self.recording is not None:
            raise problem(f"a recording is only for replay, the service here is {self.service}", "recording", "service")
        if self.service not in ("embedded", "replay") and self.crowd is not None:
            raise problem(
                f"simulated raters vote only on the embedded service, this one is {self.service}", "crowd", "service"
            )
        return self


class Budget(Section):
    """What `run-online` may spend; votes asked for count in advance. Reaching a limit ends it with exit code 6; with
    `hybrid` feedback it goes on without people. What `eval` asks comes on top."""

    votes: int | None = Field(None, ge=1)
    """Votes, those of attempts that `--fresh` gave up included."""
    usd: float | None = Field(None, gt=0)
    """Money, at the price of `usd_per_1k_votes`, and of a judge's tokens."""
    usd_per_1k_votes: float = Field(0.0, ge=0)
    """Price of 1,000 votes."""
    deadline: Duration | None = None
    """Time for `run-online`, such as `90s`, `30m` or `2h`; a number is seconds."""

    @property
    def deadline_s(self) -> float | None:
        return self.deadline


class Gates(Section):
    """What has to hold; exit code 5 otherwise."""

    win_rate: float | None = Field(None, ge=0, le=1)
    """Least share of comparisons won against the model of `eval.against`."""
    kl_nats_max: float | None = Field(None, gt=0)
    """Most drift from the reference, in nats a completion."""
    reward_gain: float | None = None
    """Least gain in mean reward."""


class Eval(Section):
    """Is the trained policy better than what it started from, and how sure is that?"""

    judge: Literal["crowd", "reward_model", "judge", "flow"]
    """Who compares: the simulated `crowd`, the `reward_model` of `train_rm`, the language model of
    `run_online.judge`, or the raters of the `flow`."""
    against: Literal["sft"] = "sft"
    """The model that the policy started from."""
    answers_per_prompt: int = Field(2, ge=1, le=64)
    """Answers of each model to each held-out prompt."""
    gates: Gates = Field(default_factory=Gates)
    """What has to hold."""


class Compute(Section):
    """What the run computes on."""

    processes: Annotated[int, NotYet(more_than_one, "more than one process is", "1")] = Field(1, ge=1)
    """Training processes on a machine."""
    machines: Annotated[int, NotYet(more_than_one, "more than one machine is", "1")] = Field(1, ge=1)
    """Machines."""
    strategy: Annotated[
        Literal["ddp", "fsdp2", "deepspeed"],
        NotYet(one_of("fsdp2", "deepspeed"), "the {value} strategy is", "ddp"),
    ] = "ddp"
    """How processes share the work."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products in `sft`, `run_online` and `eval`, in `train_rm` they are fp32; `auto` is bf16 where the
    hardware has it."""
    generator: Annotated[
        Literal["transformers", "vllm"], NotYet(one_of("vllm"), "the {value} generator is", "transformers")
    ] = "transformers"
    """What samples completions."""
    generator_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights that sample; below fp32 they are a copy, refreshed before every sampling."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; all cores when left out."""


class Logging(Section):
    """Where metrics go besides the run folder."""

    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    """Trackers, each to be installed beside rlhf."""


class Recipe(Section):
    """A run from beginning to end."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Names the run folder, `runs/<name>`: letters, digits, dot, dash and underscore."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Where all randomness comes from."""
    model: Model
    data: Data | None = None
    sft: Sft | None = None
    train_rm: TrainRm | None = None
    flow: Flow | None = None
    run_online: RunOnline | None = None
    budget: Budget = Field(default_factory=Budget)
    eval: Eval | None = None
    compute: Compute = Field(default_factory=Compute)
    logging: Logging = Field(default_factory=Logging)

    def affords(self, votes: float, groups: int) -> bool:
        """Whether people may be asked about `groups` more, on top of `votes` given, if each takes as many as it may."""
        if self.flow is None:
            return True
        most = self.flow.responses.max
        if self.run_online is not None and self.run_online.incomplete == "resubmit_once":
            most += self.flow.responses.min - 1  # asked about again only where it got fewer than the minimum
        votes += groups * most
        usd = votes * self.budget.usd_per_1k_votes / 1000
        within = self.budget.votes is None or votes <= self.budget.votes
        return within and (self.budget.usd is None or usd <= self.budget.usd)
