from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import DynamicGrowth, Limits
from draftsmith.decoding.merging import Merge, believed, concatenated, owned
from draftsmith.decoding.routing import confidence, rows_of
from draftsmith.decoding.tree import DraftTree, merged
from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap
from tests.unit.decoding.trees import Node, forests, packed, unpacked

pairs = st.integers(1, 3).flatmap(lambda rows: st.tuples(forests(batch=rows), forests(batch=rows)))


@given(pairs)
def test_side_by_side_is_one_list_after_the_other(pair: tuple[list[list[Node]], list[list[Node]]]) -> None:
    one, two = pair
    found = unpacked(concatenated([packed(one), owned(packed(two), 5)]))
    for row, first, second in zip(found, one, two, strict=True):
        shift = len(first)
        moved = [
            Node(n.token, n.parent + shift if n.parent >= 0 else -1, n.depth, n.log_q, n.owner + 5) for n in second
        ]
        assert row == [*first, *moved]


@given(pairs)
def test_a_route_takes_one_tree_a_row(pair: tuple[list[list[Node]], list[list[Node]]]) -> None:
    one, two = pair
    chosen = torch.arange(len(one)) % 2
    found = unpacked(rows_of([packed(one), packed(two)], chosen))
    assert found == [(one, two)[b % 2][b] for b in range(len(one))]


@given(forests())
def test_confidence_is_the_mean_path_probability(rows: list[list[Node]]) -> None:
    for row, found in zip(rows, confidence(packed(rows)).tolist(), strict=True):
        expected = sum(math.exp(n.log_q) for n in row) / len(row) if row else 0.0
        assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-12)


@given(forests(), st.integers(1, 15))
def test_a_trie_of_a_tree_with_itself_is_its_trie(rows: list[list[Node]], budget: int) -> None:
    tree = packed(rows)
    same = merged([tree], budget)
    twice: DraftTree = merged([tree, owned(tree, 1)], budget)
    assert unpacked(twice) == unpacked(same)


@given(forests())
def test_a_trie_of_a_tree_with_itself_is_itself(rows: list[list[Node]]) -> None:
    """Where siblings differ and nothing is impossible, nothing changes: not even the order."""
    rows = [[replace(n, token=i, log_q=-0.25 * n.depth) for i, n in enumerate(row)] for row in rows]
    tree = packed(rows)
    assert unpacked(merged([tree, owned(tree, 4)], max(tree.size, 1))) == rows


class Fixed:
    """A drafter that proposes the same distribution whatever comes."""

    wants = FeatureSpec()
    vocab = VocabMap.identity(4)

    def __init__(self, *shares: float) -> None:
        self.log_q = torch.tensor(shares).log()

    def start(self, batch: int, capacity: int) -> int:
        return batch

    def observe(self, state: int, tokens: torch.Tensor, features: object, lengths: Sequence[int]) -> Proposal:
        return Proposal(self.log_q.expand(state, 1, -1))

    def expand(self, state: int, frontier: Frontier) -> Proposal:
        return Proposal(self.log_q.expand(state, frontier.tokens.shape[1], -1))


def test_members_count_by_what_their_claims_came_to() -> None:
    members = [Fixed(0.7, 0.2, 0.06, 0.04), Fixed(0.1, 0.1, 0.3, 0.5)]
    growth = DynamicGrowth(6, 2, 2)
    merge = Merge(tuple(Single(m, growth) for m in members), "trie", 4, recent=0.5)
    state = merge.start(2, 10)
    merge.observe(state, torch.tensor([[0, 0], [0, 0]]), {}, [2, 2])  # the prompts: nothing was proposed before
    rounds = [([[0, 1], [3, 9]], [2, 1]), ([[1], [2]], [1, 0]), ([[2, 2, 0], [3, 0, 0]], [3, 1])]
    claims = [[0.9, 0.8], [0.9, 0.8]]  # of each sequence, of each member: its two likeliest
    drafted = [{0, 1}, {2, 3}]
    sums = [[[0.0, 0.0] for _ in members] for _ in range(2)]
    for tokens, lengths in rounds:
        merge.observe(state, torch.tensor(tokens), {}, lengths)
        for b, row in enumerate(tokens):
            for m in range(2):
                if lengths[b]:
                    sums[b][m][0] = 0.5 * sums[b][m][0] + claims[b][m]
                    sums[b][m][1] = 0.5 * sums[b][m][1] + (row[0] in drafted[m])
    for b in range(2):
        for m in range(2):
            assert math.isclose(float(state.claimed[m][b]), sums[b][m][0], rel_tol=1e-6)
            assert math.isclose(float(state.kept[m][b]), sums[b][m][1], rel_tol=1e-6)
    found = unpacked(merge.propose(state, Limits(torch.tensor([5, 5]), torch.tensor([]))))
    for b in range(2):
        known: dict[tuple[int, ...], tuple[float, int]] = {}
        for m, member in enumerate(members):
            r = min((sums[b][m][1] + 2) / (sums[b][m][0] + 2), 1.0)
            q = member.log_q.exp().tolist()
            for one in drafted[m]:
                paths = {(one,): r * q[one], **{(one, two): r * r * q[one] * q[two] for two in drafted[m]}}
                for path, value in paths.items():
                    known[path] = max(known.get(path, (0.0, 0)), (value, -m))
        best = sorted(known, key=lambda path: -known[path][0])[:4]
        paths_of: list[tuple[int, ...]] = []
        for node in found[b]:
            paths_of.append((*(paths_of[node.parent] if node.parent >= 0 else ()), node.token))
        assert set(paths_of) == set(best)
        for node, path in zip(found[b], paths_of, strict=True):
            assert math.isclose(math.exp(node.log_q), known[path][0], rel_tol=1e-5)
            assert node.owner == -known[path][1]


def test_members_whose_claims_were_kept_are_believed() -> None:
    tree = packed([[Node(1, -1, 1, -0.5, 0), Node(2, 0, 2, -1.0, 0)]])
    same = believed(tree, torch.tensor([3.0]), torch.tensor([4.0]))
    assert torch.equal(same.log_q, tree.log_q)
    less = believed(tree, torch.tensor([6.0]), torch.tensor([2.0]))
    assert torch.allclose(less.log_q, torch.tensor([[-0.5 + math.log(0.5), -1.0 + 2 * math.log(0.5)]]))
