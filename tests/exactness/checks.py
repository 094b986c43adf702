"""Checks that more than one test makes: the equality tests call them, and the planted faults must make them fail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, Growth
from draftsmith.decoding.trace import Generation
from draftsmith.decoding.verification import Verification
from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.drafters.head import Head
from draftsmith.foundation import seeding
from draftsmith.target.protocol import FeatureSpec, Rows
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import END, VOCAB, OracleDrafter, OracleState, prompts, tiny_target

NEW = 24
GROWTHS: dict[str, ChainGrowth | DynamicGrowth] = {
    "chain-1": ChainGrowth(1),
    "chain-4": ChainGrowth(4),
    "tree-4": DynamicGrowth(4, 3, 3),
    "tree-15": DynamicGrowth(15, 4, 4),
    "tree-64": DynamicGrowth(64, 5, 8),
    "tree-stopping": DynamicGrowth(15, 5, 4, least_mass=0.02),
}


def speculative_equals_plain(
    kind: str,
    growth: Growth,
    sampling: Sampling,
    batch: int,
    dial: float = 0.6,
    vocab: VocabMap | None = None,
    new: int = NEW,
    rule: Verification = "keyed",
) -> list[Generation]:
    """Decode plainly, then speculatively with an oracle of that text: the same tokens, in rounds that add up."""
    target = tiny_target(kind)
    asked = prompts(batch, seed=1000 * batch + sampling.seed)
    plain = Engine(target).generate(asked, sampling, new)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    drafter = OracleDrafter(texts, dial, vocab, seed=sampling.seed)
    speculative = Engine(target, Single(drafter, growth), rule).generate(asked, sampling, new)
    assert [g.token_ids for g in speculative] == [g.token_ids for g in plain]
    assert [g.finish for g in speculative] == [g.finish for g in plain]
    for prompt, g in zip(asked, speculative, strict=True):
        written = len(prompt) + 1
        for r in g.rounds:
            assert r.context == written
            assert r.nodes <= growth.budget
            written += r.kept
        assert written == len(prompt) + len(g.token_ids)
    return speculative


def verification_equals_full_passes(kind: str, tolerance: float = 1e-4) -> None:
    """Logits and states of a verified tree equal the model's own pass over each node's path, three rounds in a row.

    Each round keeps another path, so later rounds stand on rows that moved; paths are longer than sliding windows.
    """
    target = tiny_target(kind)
    want = FeatureSpec((0, 2, 7), final=True)
    texts = [list(p) for p in prompts(3, seed=5, low=4, high=11)]
    ids = torch.zeros((3, max(map(len, texts))), dtype=torch.int64)
    for b, text in enumerate(texts):
        ids[b, : len(text)] = torch.tensor(text)
    first = target.prefill(ids, [len(t) for t in texts], want, 64)
    assert first.logits is not None
    for b, text in enumerate(texts):
        logits, hidden = _full_pass(kind, text)
        _close(first.logits[b], logits[-1], tolerance, f"{kind}: prefill of row {b}")
        for name in want.names:
            _close(first.hidden[name][b, : len(text)], hidden[name], tolerance, f"{kind}: state {name} of prompt {b}")
    #        0 root, 1-2 its children, 3-4 children of 1, 5 of 2, 6 of 4
    parents = [-1, 0, 0, 1, 1, 2, 4]
    depths = torch.tensor([0, 1, 1, 2, 2, 2, 3]).expand(3, -1)
    visible = torch.eye(7, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    kept = [[[0, 1, 4, 6], [0, 2], [0]], [[0, 2, 5], [0, 1, 3], [0, 1, 4]], [[0], [0, 1], [0, 2]]]
    for turn in range(3):
        tokens = torch.tensor([[8 + seeding.key("node", turn, b, i) % 80 for i in range(7)] for b in range(3)])
        out = target.verify(Rows(tokens, depths, visible.expand(3, 7, 7)), want)
        assert out.logits is not None
        for b in range(3):
            for node in range(7):
                path = [n for n in range(7) if visible[node, n]]
                logits, hidden = _full_pass(kind, [*texts[b], *tokens[b, path].tolist()])
                where = f"{kind}: round {turn}, row {b}, node {node}"
                _close(out.logits[b, node], logits[-1], tolerance, where)
                for name in want.names:
                    _close(out.hidden[name][b, node], hidden[name][-1], tolerance, f"{where}, state {name}")
        longest = max(map(len, kept[turn]))
        target.commit(torch.tensor([k + [0] * (longest - len(k)) for k in kept[turn]]), [len(k) for k in kept[turn]])
        for b in range(3):
            texts[b] += tokens[b, kept[turn][b]].tolist()


def _full_pass(kind: str, text: Sequence[int]) -> tuple[Tensor, dict[int | str, Tensor]]:
    """transformers' own logits `[T, V]` and hidden states `[T, H]` of one text."""
    with torch.no_grad():
        out = tiny_target(kind).model(input_ids=torch.tensor([list(text)]), output_hidden_states=True, use_cache=False)
    hidden: dict[int | str, Tensor] = {k: state[0] for k, state in enumerate(out.hidden_states[:-1])}
    hidden["final"] = out.hidden_states[-1][0]
    return out.logits[0], hidden


def _close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), f"{what}: off by {error:.3g}"


class Recorder(OracleDrafter):
    """An oracle that wants features and writes down which came with each committed token."""

    def __init__(self, texts: Sequence[Sequence[int]], dial: float) -> None:
        super().__init__(texts, dial)
        self.seen: list[list[Tensor | None]] = [[] for _ in texts]

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec((2, 5), final=True)

    def observe(self, state: OracleState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        assert features is not None
        for b, n in enumerate(lengths):
            for i in range(n):
                self.seen[b].append(features[b, i].clone() if self.seen[b] or i else None)
        return super().observe(state, tokens, features, lengths)


def features_are_of_the_position_before(growth: Growth, tolerance: float = 1e-4) -> None:
    """What `observe` hands over with a token is the target's state at the position before it, as in a full pass."""
    target = tiny_target("llama")
    asked = prompts(3, seed=31)
    sampling = Sampling(temperature=0.7, seed=4, suppress_tokens=(END,))
    plain = Engine(target).generate(asked, sampling, NEW)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    recorder = Recorder(texts, 0.7)
    found = Engine(target, Single(recorder, growth)).generate(asked, sampling, NEW)
    assert any(r.accepted >= 2 for g in found for r in g.rounds)
    for b, text in enumerate(texts):
        _, hidden = _full_pass("llama", text)
        assert len(recorder.seen[b]) > len(asked[b]) + NEW // 2, "too little was observed"
        for place, state in enumerate(recorder.seen[b][1:], start=1):
            assert state is not None
            expected = torch.cat([hidden[2][place - 1], hidden[5][place - 1], hidden["final"][place - 1]])
            _close(state, expected, tolerance, f"features of token {place} in sequence {b}")


def an_end_cuts_the_path(ends: Sequence[int]) -> tuple[set[int], set[int]]:
    """Decode with several end ids and an oracle that goes on after each: the text ends at the first one.

    Returns the depths at which an end stood inside an accepted path, and the end ids that were met.
    """
    target = tiny_target("llama")
    assert target.spec.eos_ids == tuple(ends)
    inside: set[int] = set()
    met: set[int] = set()
    for seed in range(8):
        asked = prompts(4, seed=100 + seed)
        sampling = Sampling(temperature=1.3, seed=seed)
        plain = Engine(target).generate(asked, sampling, NEW)
        texts = [[*p, *g.token_ids, 9, 9, 9, 9] for p, g in zip(asked, plain, strict=True)]
        engine = Engine(target, Single(OracleDrafter(texts, 0.9), GROWTHS["tree-15"]))
        for expected, found in zip(plain, engine.generate(asked, sampling, NEW), strict=True):
            assert found.token_ids == expected.token_ids
            assert found.finish == expected.finish
            stops = [i for i, token in enumerate(found.token_ids) if token in ends]
            assert stops == ([len(found.token_ids) - 1] if found.finish == "stop" else [])
            met.update(found.token_ids[i] for i in stops)
            if stops and found.rounds and found.rounds[-1].kept == found.rounds[-1].accepted:
                inside.add(found.rounds[-1].accepted)
    return inside, met


def a_sure_oracle_is_always_accepted(growth: ChainGrowth | DynamicGrowth) -> None:
    """Where the draft vocabulary holds the text, what the oracle is sure of is accepted as deep as there is room."""
    target = tiny_target("llama")
    asked = prompts(2, seed=8)
    sampling = Sampling(suppress_tokens=tuple(range(1, VOCAB, 3)))
    plain = Engine(target).generate(asked, sampling, NEW)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    vocab = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)
    found = Engine(target, Single(OracleDrafter(texts, 1.0, vocab), growth)).generate(asked, sampling, NEW)
    for generation in found:
        written = 1
        for r in generation.rounds:
            left = len(generation.token_ids) - written
            assert r.accepted == min(growth.depth, left - (generation.finish == "length")), f"accepted {r.accepted}"
            written += r.kept


def draft_state_is_rewound(head: Head) -> None:
    """A head that expanded trees between its observations proposes what a fresh one proposes that only observed."""
    generator = torch.Generator().manual_seed(3)
    width = len(head.wants.names) * head.options.hidden_size
    tokens = torch.randint(8, 90, (2, 20), generator=generator)
    features = torch.randn(2, 20, width, generator=generator)
    used, fresh = head.start(2, 64), head.start(2, 64)
    done = [0, 0]
    for counts in ([7, 4], [3, 1], [1, 4]):
        longest = max(counts)
        pieces = torch.stack([_piece(tokens[b], done[b], longest) for b in range(2)])
        states = torch.stack([_piece(features[b], done[b], longest) for b in range(2)])
        ours = head.observe(used, pieces, states, counts).log_q
        theirs = head.observe(fresh, pieces, states, counts).log_q
        _close(ours, theirs, 1e-6, "proposal after expansions")
        # what a full round drafts: two nodes, then three below them
        head.expand(used, Frontier(torch.randint(8, 90, (2, 2), generator=generator), torch.full((2, 2), -1), 1))
        head.expand(used, Frontier(torch.randint(8, 90, (2, 3), generator=generator), torch.tensor([[0, 1, 1]] * 2), 2))
        done = [d + n for d, n in zip(done, counts, strict=True)]
    again = head.observe(used, tokens[:, :1], features[:, :1], [1, 1]).log_q
    _close(again, head.observe(fresh, tokens[:, :1], features[:, :1], [1, 1]).log_q, 1e-6, "last proposal")
    for depth, parents in ((1, [-1, -1]), (2, [0, 1])):
        frontier = Frontier(tokens[:, depth : depth + 2], torch.tensor([parents] * 2), depth)
        _close(head.expand(used, frontier).log_q, head.expand(fresh, frontier).log_q, 1e-6, f"depth {depth}")


def _piece(values: Tensor, start: int, length: int) -> Tensor:
    return values[start : start + length]
