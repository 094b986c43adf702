"""Faults that real systems had are planted one at a time; a check that the suite makes must notice each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.decoding import engine, growth, rejection, verification
from draftsmith.decoding.composition import Single
from draftsmith.decoding.drawn import Draws, SampledGrowth
from draftsmith.decoding.tree import DraftTree
from draftsmith.decoding.verification import Verdict
from draftsmith.drafters.base import Proposal
from draftsmith.drafters.head import Head, HeadState
from draftsmith.target import inside
from draftsmith.target.cache import KeyValueCache
from draftsmith.target.protocol import Rows
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.checks import (
    GROWTHS,
    a_sure_oracle_is_always_accepted,
    an_end_cuts_the_path,
    draft_state_is_rewound,
    features_are_of_the_position_before,
    speculative_equals_plain,
    verification_equals_full_passes,
)
from tests.exactness.sampled import CASES, WIDE, frequencies_are_the_targets, law_is_the_targets
from tests.tiny import END, tiny_head, tiny_target

Patch = pytest.MonkeyPatch


def position_is_the_index(patch: Patch) -> None:
    rows = DraftTree.rows

    def planted(tree: DraftTree, roots: Tensor) -> Rows:
        made = rows(tree, roots)
        return replace(made, depths=torch.arange(1 + tree.size).expand(tree.batch, -1))

    patch.setattr(DraftTree, "rows", planted)


def cache_is_not_compacted(patch: Patch) -> None:
    keep = KeyValueCache.keep

    def planted(cache: KeyValueCache, rows: Tensor, counts: Sequence[int]) -> None:
        keep(cache, torch.arange(rows.shape[1]).expand_as(rows), counts)

    patch.setattr(KeyValueCache, "keep", planted)


def siblings_are_visible(patch: Patch) -> None:
    def planted(tree: DraftTree) -> Tensor:
        deeper = tree.depths[:, :, None] > tree.depths[:, None, :]
        return deeper | torch.eye(tree.size, dtype=torch.bool)

    patch.setattr(DraftTree, "ancestors", planted)


def bonus_comes_from_the_parents_row(patch: Patch) -> None:
    walk = verification.walk

    def planted(tree: DraftTree, chosen: Tensor) -> Verdict:
        verdict = walk(tree, chosen)
        for b, nodes in enumerate(verdict.nodes):
            if nodes:
                verdict.tokens[b][-1] = int(chosen[b, nodes[-2] + 1 if len(nodes) > 1 else 0])
        return verdict

    patch.setattr(verification, "walk", planted)


def d2t_is_off_by_one(patch: Patch) -> None:
    to_target = VocabMap.to_target

    def planted(vocab: VocabMap, ids: Tensor) -> Tensor:
        return (to_target(vocab, ids) + 1) % vocab.vocab_size

    patch.setattr(VocabMap, "to_target", planted)


def the_bonus_token_is_not_processed(patch: Patch) -> None:
    choices, walk = verification.choices, verification.walk
    raw: list[Tensor] = []

    def planted_choices(tree: DraftTree, logits: Tensor, sampling: Sampling, *rest: Any) -> Tensor:
        bare = Sampling(temperature=sampling.temperature, seed=sampling.seed)
        raw[:] = [choices(tree, logits, bare, *rest)]
        return choices(tree, logits, sampling, *rest)

    def planted_walk(tree: DraftTree, chosen: Tensor) -> Verdict:
        verdict = walk(tree, chosen)
        for b, nodes in enumerate(verdict.nodes):
            if nodes:
                verdict.tokens[b][-1] = int(raw[0][b, nodes[-1] + 1])
        return verdict

    patch.setattr(verification, "choices", planted_choices)
    patch.setattr(verification, "walk", planted_walk)


def all_nodes_have_the_roots_context(patch: Patch) -> None:
    def planted(tree: DraftTree, committed: Sequence[Sequence[int]]) -> list[list[int]]:
        return [list(ids) for ids in committed for _ in range(1 + tree.size)]

    patch.setattr(verification, "_contexts", planted)


def draws_are_keyed_by_the_row(patch: Patch) -> None:
    next_tokens = verification.next_tokens

    def planted(logits: Tensor, sampling: Sampling, requests: Any, positions: Tensor, *rest: Any) -> Tensor:
        return next_tokens(logits, sampling, requests, positions[:, :1] + torch.arange(positions.shape[1]), *rest)

    patch.setattr(verification, "next_tokens", planted)


def provisional_draft_rows_stay(patch: Patch) -> None:
    observe = Head.observe

    def planted(head: Head, state: HeadState, *rest: Any) -> Proposal:
        state.lengths = [n + state.hidden.shape[1] for n in state.lengths]
        return observe(head, state, *rest)

    patch.setattr(Head, "observe", planted)


def drafted_states_stay(patch: Patch) -> None:
    observe = Head.observe

    def planted(head: Head, state: HeadState, *rest: Any) -> Proposal:
        hidden, ancestors = state.hidden, state.ancestors
        proposal = observe(head, state, *rest)
        state.hidden, state.ancestors = hidden, ancestors
        return proposal

    patch.setattr(Head, "observe", planted)


def an_end_does_not_cut(patch: Patch) -> None:
    commit = engine._Run._commit

    def planted(run: engine._Run, *rest: Any) -> Any:
        ends, run.ends = run.ends, frozenset()
        try:
            return commit(run, *rest)
        finally:
            run.ends = ends

    patch.setattr(engine._Run, "_commit", planted)


def room_is_not_respected(patch: Patch) -> None:
    pruned = growth.pruned
    patch.setattr(growth, "pruned", lambda tree, budget, room=None: pruned(tree, budget))


def features_are_those_of_the_token(patch: Patch) -> None:
    """In rounds: the accepted node's own state comes with it, not the state that produced it."""
    observe = engine._Run._observe

    def planted(
        run: engine._Run, state: object, rows: Tensor, hidden: Mapping[Any, Tensor], lengths: list[int]
    ) -> None:
        last = torch.tensor([max(n - 1, 0) for n in lengths])
        shifted = rows.roll(-1, dims=1)
        shifted[torch.arange(len(lengths)), last] = rows[torch.arange(len(lengths)), last]
        observe(run, state, shifted, hidden, lengths)

    patch.setattr(engine._Run, "_observe", planted)


def prompt_features_are_those_of_the_token(patch: Patch) -> None:
    observe = Single.observe
    first = [True]

    def planted(single: Single, state: Any, tokens: Tensor, hidden: Mapping[Any, Tensor], lengths: Any) -> None:
        if first:
            first.clear()
            hidden = {name: states.roll(-1, dims=1) for name, states in hidden.items()}
        observe(single, state, tokens, hidden, lengths)

    patch.setattr(Single, "observe", planted)


def windows_are_ignored(patch: Patch) -> None:
    for kind in ("mistral", "gemma3"):
        target = tiny_target(kind)
        assert 6 in target._window.values()
        patch.setattr(target, "_window", dict.fromkeys(target._window))


def windows_count_slots(patch: Patch) -> None:
    masks = inside.cached_masks

    def planted(
        windows: Mapping[str, int | None], lengths: Tensor, positions: Tensor, visible: Tensor, span: int
    ) -> dict[str, Tensor]:
        return masks(windows, lengths, lengths[:, None] + torch.arange(positions.shape[1]), visible, span)

    patch.setattr(inside, "cached_masks", planted)


def residual_is_not_renormalised(patch: Patch) -> None:
    patch.setattr(rejection, "left_over", lambda p, q: (p - q).clamp(min=0))


def residual_is_the_targets_distribution(patch: Patch) -> None:
    """What is drawn after a refusal comes from p, as if nothing had been proposed."""
    patch.setattr(rejection, "left_over", lambda p, q: p)


def a_blocks_coins_are_those_of_its_tokens(patch: Patch) -> None:
    """Tokens are judged one by one, but the next token is drawn as block verification draws it."""
    block = rejection.block_chances

    def planted(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        own = (p[:, :-1].gather(2, tokens[:, :, None]) / q.gather(2, tokens[:, :, None]))[:, :, 0].clamp(max=1)
        reached = torch.arange(tokens.shape[1]) < lengths[:, None]
        return own.cumprod(1) * reached, block(p, q, tokens, lengths)[1]

    patch.setattr(rejection, "block_chances", planted)


def q_is_at_another_temperature(patch: Patch) -> None:
    """Candidates are drawn at one temperature and judged as if at another."""
    grow = SampledGrowth.grow

    def planted(policy: SampledGrowth, *rest: Any) -> DraftTree:
        tree = grow(policy, *rest)
        assert tree.sampled
        return replace(tree, sampled=replace(tree.sampled, log_q=(tree.sampled.log_q / 0.7).log_softmax(-1)))

    patch.setattr(SampledGrowth, "grow", planted)


def a_tree_is_cut_after_seeing_its_tokens(patch: Patch) -> None:
    """Candidates that the drafter itself thinks unlikely are dropped once they are drawn (DSpark's fault A)."""
    grow = SampledGrowth.grow

    def planted(policy: SampledGrowth, *rest: Any) -> DraftTree:
        tree = grow(policy, *rest)
        return replace(tree, log_q=tree.log_q.masked_fill(tree.log_q < -1.0, -torch.inf))

    patch.setattr(SampledGrowth, "grow", planted)


def purposes_share_their_draws(patch: Patch) -> None:
    keys = Draws.keys
    patch.setattr(Draws, "keys", lambda draws, purpose, depth: keys(draws, "proposal", depth))


def law(case: str, count: int = 2) -> Callable[[], object]:
    return lambda: law_is_the_targets((CASES | WIDE)[case], Sampling(temperature=0.8), (), count)


def frequencies(case: str, count: int = 2) -> Callable[[], object]:
    return lambda: frequencies_are_the_targets(CASES[case], Sampling(temperature=0.8), count)


def equality(temperature: float = 0.0, batch: int = 2, **processors: Any) -> Callable[[], object]:
    sampling = Sampling(temperature=temperature, seed=2, **processors)
    return lambda: speculative_equals_plain("llama", GROWTHS["tree-15"], sampling, batch)


@dataclass(frozen=True)
class Fault:
    plant: Callable[[Patch], None]
    check: Callable[[], object]


FAULTS = [
    Fault(position_is_the_index, equality()),
    Fault(position_is_the_index, equality(1.0)),
    Fault(cache_is_not_compacted, equality()),
    Fault(cache_is_not_compacted, lambda: verification_equals_full_passes("qwen3")),
    Fault(siblings_are_visible, equality()),
    Fault(bonus_comes_from_the_parents_row, equality()),
    Fault(bonus_comes_from_the_parents_row, equality(1.0)),
    Fault(d2t_is_off_by_one, lambda: a_sure_oracle_is_always_accepted(GROWTHS["chain-4"])),
    Fault(d2t_is_off_by_one, lambda: a_sure_oracle_is_always_accepted(GROWTHS["tree-15"])),
    Fault(the_bonus_token_is_not_processed, equality(repetition_penalty=1.8)),
    Fault(the_bonus_token_is_not_processed, equality(1.0, top_k=3)),
    Fault(all_nodes_have_the_roots_context, equality(repetition_penalty=1.8)),
    Fault(all_nodes_have_the_roots_context, equality(1.0, repetition_penalty=1.8)),
    Fault(draws_are_keyed_by_the_row, equality(1.0)),
    Fault(provisional_draft_rows_stay, lambda: draft_state_is_rewound(tiny_head())),
    Fault(drafted_states_stay, lambda: draft_state_is_rewound(tiny_head())),
    Fault(an_end_does_not_cut, lambda: an_end_cuts_the_path((END,))),
    Fault(room_is_not_respected, equality(batch=4)),
    Fault(features_are_those_of_the_token, lambda: features_are_of_the_position_before(GROWTHS["tree-15"])),
    Fault(prompt_features_are_those_of_the_token, lambda: features_are_of_the_position_before(GROWTHS["tree-15"])),
    Fault(windows_are_ignored, lambda: verification_equals_full_passes("mistral")),
    Fault(windows_are_ignored, lambda: verification_equals_full_passes("gemma3")),
    Fault(windows_count_slots, lambda: verification_equals_full_passes("mistral")),
    Fault(residual_is_not_renormalised, law("independent-wide")),
    Fault(residual_is_not_renormalised, law("without-replacement-wide")),
    Fault(residual_is_the_targets_distribution, law("chain")),
    Fault(residual_is_the_targets_distribution, frequencies("chain")),
    Fault(a_blocks_coins_are_those_of_its_tokens, law("block", 3)),
    Fault(q_is_at_another_temperature, law("chain")),
    Fault(q_is_at_another_temperature, law("block")),
    Fault(q_is_at_another_temperature, frequencies("without-replacement")),
    Fault(a_tree_is_cut_after_seeing_its_tokens, law("chain")),
    Fault(a_tree_is_cut_after_seeing_its_tokens, law("independent")),
    Fault(a_tree_is_cut_after_seeing_its_tokens, law("block")),
    Fault(purposes_share_their_draws, frequencies("chain")),
    Fault(purposes_share_their_draws, frequencies("block")),
]

# traps.md, item 4
NAMED = {
    "tree position = index instead of depth": position_is_the_index,
    "cache not compacted": cache_is_not_compacted,
    "sibling visible in the mask": siblings_are_visible,
    "bonus from the wrong row": bonus_comes_from_the_parents_row,
    "residual not renormalised": residual_is_not_renormalised,
    "d2t off by one": d2t_is_off_by_one,
    "processors skipped on the bonus token": the_bonus_token_is_not_processed,
    "draft state not rewound": provisional_draft_rows_stay,
    "q at another temperature than the draw": q_is_at_another_temperature,
    "truncation after seeing the token": a_tree_is_cut_after_seeing_its_tokens,
}


def test_all_ten_named_faults_are_planted() -> None:
    assert len(NAMED) == 10
    assert set(NAMED.values()) <= {fault.plant for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_noticed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.check()
    with monkeypatch.context() as patch:
        fault.plant(patch)
        with pytest.raises(AssertionError):
            fault.check()
