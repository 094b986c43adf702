"""Served against replayed: does a drafter accept in its server what it accepts here, and if not, why?

The server answers prompts greedily; its counters say what it accepted. The same drafter is then replayed over the very
texts that the server wrote, so that one number is compared with its like: rounds of a chain of as many tokens, counted
as the server counts them. What else may have been expected (a tree, the count after the cut) is replayed beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftsmith.data import served
from draftsmith.data.replies import Asked, Tally
from draftsmith.data.served import ServerOptions
from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, Growth
from draftsmith.decoding.trace import Round
from draftsmith.drafters.base import Drafter
from draftsmith.evaluation import equality
from draftsmith.evaluation.metrics import Counts, count_rounds
from draftsmith.evaluation.replayed import replay
from draftsmith.export import server_counts
from draftsmith.export.checkpoint import Serving
from draftsmith.export.findings import Finding
from draftsmith.export.server_counts import ServerCounts
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, Rows, Target, TargetOut
from draftsmith.target.replay import StoredAnswer
from draftsmith.target.sampling import Sampling

# Same texts, so accepted drafts differ only where rounding turns the drafter's choice: of their number.
CLOSE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
FIELD = "acceptance"

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Asking:
    """What is asked of the server: prompts as token ids, and tokens of an answer at most."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int


@dataclass(frozen=True)
class Comparison:
    """Counts of the same texts, by way of counting.

    Attributes:
        served: by the server.
        chain: replayed as the server drafts and counts.
        tree: replayed with the tree that the export was made for.
        far: tokens of the server's that are not the target's greedy choice, near ties apart.
        tokens: tokens of all answers.
        promised: speculative tokens in the export's command; None where it names none.
        dtype: of the replayed target.
        misread: prompts that the server read as another number of tokens.
    """

    served: ServerCounts
    chain: Counts
    tree: Counts
    serving: Serving
    far: int
    tokens: int
    promised: int | None
    dtype: torch.dtype
    misread: int = 0

    def rows(self) -> list[tuple[str, float]]:
        """How it is counted, and the acceptance length."""
        k = self.served.tokens
        tree = f"a tree of {self.serving.nodes} nodes, depth {self.serving.depth}, replayed"
        return [
            (f"served: a chain of {k}, before the cut at the answer's end", self.served.acceptance_length),
            (f"a chain of {k}, replayed, before the cut", self.chain.acceptance_length),
            (f"a chain of {k}, replayed, after the cut", self.chain.acceptance_length_after_cut),
            (tree + ", before the cut", self.tree.acceptance_length),
        ]


def compare(
    url: str, target: HFTarget, drafter: Drafter, asking: Asking, serving: Serving, promised: int | None = None
) -> Comparison:
    """Let the server answer, replay what it wrote.

    Args:
        url: of a vLLM server of this target and drafter that nobody else uses meanwhile.
        serving: the numbers that the drafter was exported with (its tree).
        promised: speculative tokens in the export's command.

    Raises:
        UserError: no such server, it does not speculate, returns no token ids, or serves others at the same time.
    """
    options = ServerOptions(url=url, concurrency=1)
    before = server_counts.read(options.url)
    tally = Tally()
    asked = [Asked(i, list(prompt), f"check/{i}") for i, prompt in enumerate(asking.prompts)]
    ends = target.spec.eos_ids
    found = served.answer(options, asked, Sampling(), asking.max_new_tokens, target.tokenizer, ends, tally)
    answers = {answer.index: answer.token_ids for answer in found}
    if tally.without_ids:
        raise UserError(f"{url} returns no token ids, so its answers can't be replayed: serve with vLLM 0.10 or later")
    written = sum(len(ids) for ids in answers.values())
    counts = server_counts.settled(options.url, before, written)
    if counts.written != written:
        raise UserError(
            f"{url} counts {counts.written} new tokens where it wrote {written} for this check: others use it "
            "meanwhile; check a server that is idle"
        )
    if not counts.rounds:
        raise UserError(f"{url} drafted nothing for {len(asked)} prompts: its speculation is switched off")
    texts = [answers[i] for i in range(len(asked))]
    tree = DynamicGrowth(serving.nodes, serving.depth, serving.top_k)
    chain = ChainGrowth(counts.tokens)
    judged = zip(asking.prompts, texts, strict=True)
    return Comparison(
        served=counts,
        chain=replayed(target, drafter, chain, asking.prompts, texts),
        tree=replayed(target, drafter, tree, asking.prompts, texts),
        serving=serving,
        far=sum(equality.teacher_forced(target, prompt, text, Sampling()) for prompt, text in judged),
        tokens=written,
        promised=promised,
        dtype=target.dtype,
        misread=tally.misread,
    )


class Endless:
    """A target without end tokens: servers draft, and count, past an answer's end."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.spec = replace(target.spec, eos_ids=())
        self.device = target.device

    def prefill(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec, capacity: int) -> TargetOut:
        return self._target.prefill(ids, lengths, want, capacity)

    def verify(self, rows: Rows, want: FeatureSpec) -> TargetOut:
        return self._target.verify(rows, want)

    def commit(self, rows: Tensor, counts: Sequence[int]) -> None:
        self._target.commit(rows, counts)

    def select(self, sequences: Sequence[int]) -> None:
        self._target.select(sequences)


def replayed(target: HFTarget, drafter: Drafter, growth: Growth, prompts: Texts, answers: Texts) -> Counts:
    """The rounds in which these answers come about, counted as vLLM counts them.

    vLLM drafts on where an answer is about to end, by an end token or its limit, and counts what was accepted behind
    it. So the target writes each answer a little further, and the rounds that begin within the answer count.
    """
    found: list[Round] = []
    for rounds in rounds_of(target, drafter, growth, prompts, answers):
        found += rounds
    return count_rounds(found)


def rounds_of(target: HFTarget, drafter: Drafter, growth: Growth, prompts: Texts, answers: Texts) -> list[list[Round]]:
    """`replayed`, by answer; `kept` is what stays within the answer."""
    on = Endless(target)
    stored = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = [*prompt, *answer]
        (more,) = Engine(on).generate([text], max_new_tokens=growth.budget + 2)
        ids = [*text, *more.token_ids]
        hidden = target.read(torch.tensor([ids]), [len(ids)], drafter.wants)
        states = {name: hidden[name][0] for name in drafter.wants.names}
        stored.append(StoredAnswer(ids, len(prompt), states, complete=False))
    generations = replay(Single(drafter, growth), on.spec, stored, device=target.device)
    return [within(g.rounds, len(answer)) for g, answer in zip(generations, answers, strict=True)]


def within(rounds: Sequence[Round], length: int) -> list[Round]:
    """The rounds that begin before `length` tokens are written (the first is the prefill's); `kept` is cut there."""
    out = []
    written = 1
    for r in rounds:
        if written >= length:
            break
        out.append(replace(r, kept=min(r.kept, length - written)))
        written += r.kept
    return out


def causes(c: Comparison) -> list[Finding]:
    """Why the served number is not the replayed one (errors), or not the one that was expected (warnings)."""
    out: list[Finding] = []
    if c.misread:
        out.append(
            Finding(
                FIELD,
                f"for {c.misread} prompts the server read another number of tokens than were sent",
                "let it read token ids as they are; its answers here are to other prompts",
            )
        )
    most = CLOSE.get(c.dtype, 0.01)
    expected = c.chain.accepted / c.chain.rounds
    found = c.served.acceptance_length - 1
    differs = abs(found - expected) > max(most * expected, 2 / c.chain.rounds)
    if c.far > 0.01 * c.tokens:
        out.append(
            Finding(
                FIELD,
                f"numerics or another target: {c.far} of {c.tokens} tokens that the server wrote are not the target's "
                "greedy choice, which rounding does not explain",
                "serve the very target that the drafter was made for, in its number format, greedy, without a changed "
                "template or quantisation",
            )
        )
    elif differs:
        out.append(_gap(c, found, expected))
    k = c.served.tokens
    if c.promised is not None and k != c.promised:
        out.append(
            Finding(
                FIELD,
                f"speculative tokens: the server drafts {k} tokens a round, the export's command says {c.promised}",
                f'start it with "num_speculative_tokens": {c.promised} if that number was meant',
                "warning",
            )
        )
    if c.tree.acceptance_length > c.chain.acceptance_length * (1 + most):
        out.append(
            Finding(
                FIELD,
                f"chain or tree: on these texts a tree of {c.serving.nodes} nodes accepts "
                f"{c.tree.acceptance_length:.2f}, this server's chain of {k} {c.chain.acceptance_length:.2f}",
                "expect the chain's number of a server without trees (vLLM); SGLang drafts trees",
                "warning",
            )
        )
    before, after = c.chain.acceptance_length, c.chain.acceptance_length_after_cut
    if before > after * (1 + most):
        out.append(
            Finding(
                FIELD,
                f"before or after the cut: vLLM counts what was accepted behind an answer's end ({before:.2f}); "
                f"counted by the tokens of the answers it is {after:.2f}",
                "compare numbers of the same kind; the difference is that of short answers",
                "warning",
            )
        )
    return out


def _gap(c: Comparison, found: float, expected: float) -> Finding:
    """A gap between like and like, with what the depths say of its cause."""
    mine = [n / c.chain.rounds for n in c.chain.accepted_at_depth]
    theirs = [n / c.served.rounds for n in c.served.at_depth]
    first = bool(mine and theirs) and abs(theirs[0] - mine[0]) > 0.05 * max(mine[0], 0.05)
    shown = f"by depth served {_shares(theirs)}, replayed {_shares(mine)}"
    if found > expected:
        why, fix = (
            "more than this drafter can: the server runs another drafter, or accepts by another rule",
            "see that the server was started with this folder and verifies strictly",
        )
    elif first:
        why, fix = (
            "already the first drafted token is accepted less often, so the head reads other states or weights there",
            "compare auxiliary layers in the server's log with the export's, the target's fingerprint, and the method",
        )
    else:
        why, fix = (
            "the first drafted token fares alike and later ones do not, so what the head passes on to itself differs",
            "look at norm_output, RoPE and the longest position in config.json, and at the server's version",
        )
    return Finding(
        FIELD,
        f"a chain of {c.served.tokens} accepts {1 + found:.3f} served and {1 + expected:.3f} replayed on the same "
        f"texts ({shown}): {why}",
        fix,
    )


def _shares(shares: Sequence[float]) -> str:
    return "/".join(f"{share:.2f}" for share in shares) or "nothing"


def serving_of(config: Mapping[str, object]) -> tuple[Serving, int | None]:
    """The numbers that an export recorded in its `config.json`, and the tokens that its command names, if any."""
    recorded = config.get("draftsmith")
    numbers = recorded.get("serving") if isinstance(recorded, Mapping) else None
    if not isinstance(numbers, Mapping):
        return Serving(), None
    names = [field.name for field in dataclasses.fields(Serving)]
    fields = {name: numbers[name] for name in names if isinstance(numbers.get(name), int)}
    known = Serving(**fields)
    return known, known.tokens if "tokens" in fields else None
