"""Acceptance of a standalone draft's chains of any length, from one pass of the draft over stored answers.

A chain is accepted as far as its tokens are the answer's; up to there the draft has read the answer itself. So whether
the draft's likeliest token is the answer's next one, at every place of the answer, is all that the rounds of any chain
follow from. Tested to be `replay`'s counts, which drafts every chain anew.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from draftsmith.data.features import FeatureStore, plan
from draftsmith.numerics.losses import chunked_head_loss, total_variation
from draftsmith.studies.corpus import AnswerSet
from draftsmith.studies.rows import Row
from draftsmith.training.objectives.distillation import DistillationObjective

BATCH_POSITIONS = 4096


@dataclass(frozen=True)
class Followed:
    """What a draft makes of an answer, from its second token on (the first comes with the prompt).

    Attributes:
        right: whether the draft's likeliest token is the answer's.
        overlap: Σ min(p, q) there, at temperature 1; what the draft vocabulary lacks is lost.
    """

    right: list[bool]
    overlap: list[float]


@dataclass(frozen=True)
class Chains:
    """The rounds of one answer with chains of some length.

    Attributes:
        rounds: how many; accepted, offered: drafted tokens accepted and put to the test, by depth from 1.
    """

    rounds: int
    accepted: list[int]
    offered: list[int]

    @property
    def committed(self) -> int:
        """Tokens, each round's bonus included."""
        return self.rounds + sum(self.accepted)

    @property
    def rejected(self) -> int:
        """Rounds that ended with a refused token."""
        return sum(self.offered) - sum(self.accepted)


def walked(right: Sequence[bool], length: int, complete: bool) -> Chains:
    """The rounds in which chains of `length` tokens write an answer, given where the draft is right.

    `complete`: it ends with an end token, which may be drafted; where an answer is cut, its last token is a bonus.
    """
    rounds, written = 0, 0
    accepted, offered = [0] * length, [0] * length
    while written < len(right):
        room = min(length, len(right) - written - (not complete))
        depth = 0
        while depth < room and right[written + depth]:
            offered[depth] += 1
            accepted[depth] += 1
            depth += 1
        if depth < room:
            offered[depth] += 1
        rounds += 1
        written += depth + 1
    return Chains(rounds, accepted, offered)


@torch.no_grad()
def followed(objective: DistillationObjective, store: FeatureStore, ids: Sequence[str]) -> dict[str, Followed]:
    """A draft's reading of stored answers; each sample is one answer."""
    draft = objective.draft
    known = dict(zip(store.ids, store.lengths, strict=True))
    weight, token_ids = draft.output_rows(), draft.vocab.target_ids.to(draft.device)
    found: dict[str, Followed] = {}
    for group in plan([known[i] for i in ids], BATCH_POSITIONS):
        samples = store.fetch([ids[i] for i in group], 0)
        batch = objective.collate([[sample] for sample in samples], draft.device)
        row, place = batch.taught.nonzero().unbind(1)
        states = draft.states(batch.ids, batch.segments, batch.places)[row, place]
        likeliest = torch.cat([(part @ weight.T).argmax(-1) for part in states.split(BATCH_POSITIONS // 8)])
        right = token_ids[likeliest] == batch.ids[row, place + 1]
        teacher = (batch.final[row, place], objective.teacher_weight, batch.log_z[row, place])
        overlap = 1.0 - chunked_head_loss(states, weight, *teacher, total_variation)
        for number, sample in enumerate(samples):
            own = row == number
            found[sample.id] = Followed(right[own][1:].tolist(), overlap[own][1:].float().tolist())
    return found


def chain_rows(
    objective: DistillationObjective,
    stores: Mapping[float, FeatureStore],
    tests: Iterable[AnswerSet],
    lengths: Sequence[int],
    eos_ids: Container[int],
    common: Mapping[str, object],
    extra: Mapping[str, str | int | float],
) -> list[Row]:
    """A row for each test set and chain length.

    Args:
        objective: of the draft, in the target's number format.
        stores: the test answers' features by temperature.
        common, extra: the fields that all of the cell's rows share.
    """
    rows = []
    for test in tests:
        read = followed(objective, stores[test.temperature], test.ids)
        overlaps = [value for name in test.ids for value in read[name].overlap]
        more = {"overlap": round(sum(overlaps) / max(len(overlaps), 1), 5), "overlap_tokens": len(overlaps)}
        for length in lengths:
            each = [
                walked(read[name].right, length, answer.complete and answer.ids[-1] in eos_ids)
                for name, answer in zip(test.ids, test.answers, strict=True)
            ]
            rounds, accepted, offered = (
                sum(c.rounds for c in each),
                [sum(c.accepted[d] for c in each) for d in range(length)],
                [sum(c.offered[d] for c in each) for d in range(length)],
            )
            rows.append(
                Row.model_validate(
                    {
                        **common,
                        "domain": test.domain,
                        "benchmark": test.benchmark,
                        "temperature": test.temperature,
                        "growth": "chain",
                        "node_budget": length,
                        "acceptance_length": (rounds + sum(accepted)) / rounds if rounds else None,
                        "alpha": sum(accepted) / sum(offered) if sum(offered) else None,
                        "alpha_by_depth": [a / o for a, o in zip(accepted, offered, strict=True) if o],
                        "target_passes": rounds,
                        "prompts": test.ids,
                        "committed": [c.committed for c in each],
                        "rounds": [c.rounds for c in each],
                        "rejected": [c.rejected for c in each],
                        "extra": {**extra, **more},
                    }
                )
            )
    return rows
