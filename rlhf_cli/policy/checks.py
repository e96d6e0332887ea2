"""What is wrong with a model, its tokenizer, and how they meet the data: looked for before hours are spent.

Each check of a stage raises DataError for what would make its numbers meaningless and returns the rest as warnings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.policy.encoding import Encoded, batch_of, is_encoder
from rlhf_cli.policy.load import load_config, load_stop_token_ids, load_tokenizer
from rlhf_cli.policy.row_checks import Example, Finding, check_rows, doubled, places, settle, shared_prompts
from rlhf_cli.types import Message

PROBE = (Message("user", "Name a colour."), Message("assistant", "Blue."), Message("user", "And an animal?"))
"""A conversation to try templates and heads on."""
PROBE_ANSWERS = ("The blue whale, which is larger than any other animal.", "No.")
"""Two answers to it that no reward model may score alike."""


def check_sft(path: str, train: Sequence[Example], heldout: Sequence[Example], max_length: int) -> list[str]:
    """What is worth saying before supervised fine-tuning of the model at `path`.

    Raises:
        DataError: What would make the result meaningless.
    """
    tokenizer = load_tokenizer(path)
    findings = [*check_rows(train, heldout), *_vocabulary(path, tokenizer, [*train, *heldout])]
    if any(row.prompt for row in train):
        findings += _conversations(path, tokenizer)
        findings += _control_tokens(tokenizer, [*train, *heldout])
    findings += _no_room(tokenizer, train, max_length)
    return settle(findings)


def check_train_rm(path: str, train: Sequence[Example], heldout: Sequence[Example]) -> list[str]:
    """What is worth saying before a reward model is made of the model at `path`; `check_head` looks at the rest.

    Raises:
        DataError: What would make the result meaningless.
    """
    tokenizer, rows = load_tokenizer(path), [*train, *heldout]
    findings = [*check_rows(train, heldout), *_vocabulary(path, tokenizer, rows), *_control_tokens(tokenizer, rows)]
    if tokenizer.chat_template:
        findings += _broken_template(path, tokenizer)
    elif not is_encoder(tokenizer) and any(len(row.prompt) > 1 for row in rows):
        findings.append(
            Finding(
                f"the tokenizer of '{path}' has no chat template, so the turns of a conversation are joined by line "
                "ends and the reward model cannot tell who said what; start from a model that has one"
            )
        )
    return settle(findings)


def check_run_online(
    policy: PreTrainedTokenizerBase,
    reward_model: PreTrainedTokenizerBase | None,
    prompts: Sequence[Example],
    heldout: Sequence[Example],
) -> list[str]:
    """What is worth saying before a policy answers `prompts`, scored by `reward_model` where there is one."""
    findings = [*doubled(prompts), *shared_prompts(prompts, heldout), *_control_tokens(policy, [*prompts, *heldout])]
    if policy.chat_template is None and any(len(row.prompt) > 1 for row in prompts):
        findings.append(
            Finding(
                "the policy's tokenizer has no chat template, so the turns of a prompt are joined by line ends and it "
                "cannot tell who said what; start from an instruct model"
            )
        )
    if reward_model is not None:
        findings += _templates_agree(policy, reward_model)
    return settle(findings)


@torch.no_grad()
def check_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> None:
    """Make sure that the head of a reward model reads the end of the text, whatever stands beside it in the batch.

    Args:
        rows: Two inputs that have to score differently, of different lengths.

    Raises:
        DataError: Padding that the head cannot tell from text, or scores that do not depend on the completion.
    """
    pad, name = tokenizer.pad_token_id, tokenizer.pad_token
    if pad is None or pad == tokenizer.eos_token_id:
        raise DataError(
            f"the reward model pads with {name!r}, which also ends a text, so its head cannot tell where the text "
            "ends; give the tokenizer a padding token of its own"
        )
    known = model.config.get_text_config().pad_token_id
    if known != pad:
        raise DataError(
            f"the reward model takes token {known} for padding, its tokenizer pads with {pad} ({name!r}); set "
            "pad_token_id in its config.json to the tokenizer's"
        )
    if tokenizer.padding_side != "right":
        raise DataError(
            "the reward model's tokenizer pads on the left, where whoever loads the model gets other scores than it "
            'was trained with; set "padding_side": "right" in its tokenizer_config.json'
        )
    was_training = model.training
    model.eval()
    alone_R = torch.cat([model(**batch_of([row], pad, model.device)).logits.float().mean(1) for row in rows])
    together_R = model(**batch_of(rows, pad, model.device)).logits.float().mean(1)  # several heads vote
    model.train(was_training)
    apart = float((alone_R[0] - alone_R[1]).abs())
    if apart <= 1e-6 * float(alone_R.abs().max()):
        raise DataError(
            f"the reward model gives two different answers the same score ({float(alone_R[0]):.6g}): its head does "
            "not see the end of the text. Look at pad and EOS token of its tokenizer, and whether its chat template "
            "keeps the assistant's turn"
        )
    if float((alone_R - together_R).abs().max()) > 0.1 * apart:
        raise DataError(
            "the reward model scores a text differently when a longer one stands beside it, so its head reads "
            "padding; look at the pad token of its tokenizer and at pad_token_id in its config.json"
        )


def _vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> Iterator[Finding]:
    """Tokens that the model has no embedding for. One that nobody writes does no harm; some models bring one."""
    embeddings = load_config(path).get_text_config().vocab_size
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= embeddings}
    if not beyond:
        return
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    used = {token for token in beyond if token not in added or token in tokenizer.special_tokens_map.values()}
    hits = list(_holding(beyond.keys() - used, rows))
    if used or hits:
        named = ", ".join(repr(t) for t in sorted(used or {token for _, token in hits})[:3])
        where = "" if used else f"{places([row for row, _ in hits])}: "
        yield Finding(
            f"{where}the tokenizer of '{path}' knows {len(beyond)} tokens that the model has no embedding for "
            f"({named}; the model has {embeddings}); use the tokenizer that the model came with, or resize its "
            "embeddings",
            fatal=True,
        )


def _conversations(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether conversations can be written for the model, and whether what it learns ends where generation ends."""
    if not tokenizer.chat_template:
        yield Finding(
            f"the tokenizer of '{path}' has no chat template, so conversations cannot be written for it. Start from an "
            'instruct model, put a chat_template.jinja into its folder, or give the rows as {"text": ...}',
            fatal=True,
        )
        return
    if broken := list(_broken_template(path, tokenizer)):
        yield from broken
        return
    asked = _ids(tokenizer, PROBE, generation=True)
    answered = _ids(tokenizer, (*PROBE, Message("assistant", PROBE_ANSWERS[0])))
    if answered[: len(asked)] != asked:
        yield Finding(
            f"the chat template of '{path}' writes a prompt differently once it is answered, so the loss does not "
            "start where the answer starts; use a template that only adds to the prompt"
        )
    stops = set(load_stop_token_ids(path, tokenizer))
    if not stops & set(answered[-3:]):
        end, known = tokenizer.decode(answered[-3:]), [tokenizer.decode([i]) for i in sorted(stops)]
        yield Finding(
            f"answers are written with the end {end!r} by the chat template of '{path}', but generation ends only at "
            f"{known or 'no token at all'}, so the model will not learn to stop; set eos_token of its tokenizer to the "
            "token that ends a turn"
        )


def _broken_template(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """A template that fails, or one that leaves out what was said."""
    try:
        texts = [_rendered(tokenizer, (*PROBE, Message("assistant", answer))) for answer in PROBE_ANSWERS]
    except TemplateError as error:
        yield Finding(f"the chat template of '{path}' cannot write a conversation: {error}", fatal=True)
        return
    lost = [a for text, a in zip(texts, PROBE_ANSWERS, strict=True) if a not in text]
    lost += [m.content for m in PROBE if m.role == "user" and m.content not in texts[0]]
    if lost:
        yield Finding(
            f"the chat template of '{path}' leaves out {lost[0]!r} of a conversation that holds it, so the model would "
            "not see it; use the template that the model came with",
            fatal=True,
        )


def _templates_agree(policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Whether both models read the same text. An encoder has no template and reads plain text, as it was trained."""
    if policy.chat_template is None or is_encoder(reward_model):
        return
    turns = (*PROBE, Message("assistant", PROBE_ANSWERS[0]))
    theirs = _rendered(reward_model, turns) if reward_model.chat_template else None
    ours = _rendered(policy, turns)
    if theirs is None:
        yield Finding(
            "the policy writes conversations by a chat template and the reward model has none: it reads turns joined "
            "by line ends and cannot tell who said what; train it from the same model as the policy"
        )
    elif theirs != ours:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
        )
        yield Finding(
            "policy and reward model have different chat templates: where the one writes "
            f"{ours[at : at + 30]!r} the other has {theirs[at : at + 30]!r}. Scores are made from the text with the "
            "reward model's own template, so this is right only if it was trained with that one; otherwise run "
            "train-rm again from the policy's model"
        )


def _control_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> Iterator[Finding]:
    """Text that the tokenizer would take for its own marks: a user could end a turn, or speak as another."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    hits = list(_holding(special, rows))
    if hits:
        yield Finding(
            f"{places([row for row, _ in hits])}: the text holds {hits[0][1]!r}, which the tokenizer takes for its own "
            "mark and not for text, so whoever wrote it could end a turn or speak as another; write it differently or "
            "remove the rows"
        )


def _holding(tokens: set[str], rows: Sequence[Example]) -> Iterator[tuple[Example, str]]:
    """Rows in whose text one of `tokens` stands, and the first that does."""
    if not tokens:
        return
    mark = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    for row in rows:
        texts = (*(m.content for m in row.prompt), *row.completions)
        if found := next(filter(None, map(mark.search, texts)), None):
            yield row, found[0]


def _no_room(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int) -> Iterator[Finding]:
    """Rows whose prompt alone fills the context: no token of the answer is left to learn from."""
    if not tokenizer.chat_template:
        return
    # A token is at least a character long, nearly always; the rest is the template's.
    long = [row for row in rows if sum(len(m.content) for m in row.prompt) > max_length // 2]
    bad = [row for row in long if len(_ids(tokenizer, row.prompt, generation=True)) >= max_length]
    if bad:
        yield Finding(
            f"{places(bad)}: the prompt alone fills sft.max_length ({max_length} tokens) in {len(bad)} of {len(rows)} "
            "rows, so nothing is learned from their answers; raise it, or shorten the prompts",
            fatal=2 * len(bad) > len(rows),
        )


def _turns(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in turns]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> str:
    return str(tokenizer.apply_chat_template(_turns(turns), tokenize=False))


def _ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], *, generation: bool = False) -> list[int]:
    ids = tokenizer.apply_chat_template(
        _turns(turns), add_generation_prompt=generation, tokenize=True, return_dict=False
    )
    return [int(i) for i in ids]
