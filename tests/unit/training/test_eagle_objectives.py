"""The objectives of EAGLE and HASS: against naive losses in float64, chain by chain, and HASS's masks against dense
attention with one matrix a step; then heads that learn eight answers by heart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.data.features import FeatureStore, StoredSample
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.base import Frontier
from draftsmith.drafters.eagle import Eagle
from draftsmith.drafters.unrolled import StepOut
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay, stored_answer
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.objectives.base import compared
from draftsmith.training.objectives.eagle import EagleLossOptions, EagleObjective, collated, disturbed
from draftsmith.training.objectives.hass import HassLossOptions, HassObjective
from draftsmith.training.objectives.taught import Taught
from tests.tiny import VOCAB, tiny_eagle, tiny_target
from tests.unit.training.stored import answered, random_samples, stored
from tests.unit.training.test_batches import counts

CPU = torch.device("cpu")
PART = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)
Objective = EagleObjective | HassObjective
Terms = dict[tuple[str, int], dict[tuple[int, int], float]]


def objective_of(kind: str, head: Eagle, **options: Any) -> Objective:
    if kind == "eagle":
        return EagleObjective(head, EagleLossOptions(**options), block_rows=5)
    return HassObjective(head, HassLossOptions(**{"steps": 3, "top_k": 4, **options}), block_rows=5)


def values(objective: Objective, rows: list[list[StoredSample]], draw: Sequence[int] = (0, 7)) -> Terms:
    """Weighted losses by term and step, then by (sample, position)."""
    batch = objective.collate(rows, CPU)
    unroll, found = batch.rows.unroll, {}
    for term in objective.losses(batch, draw):
        row, start = batch.rows.counted[term.step].nonzero().unbind(1)
        places = unroll.positions[row, unroll.starts[row, start]].tolist()
        assert term.facts.samples is not None
        keys = zip(term.facts.samples.tolist(), places, strict=True)
        weighted = (term.weight * term.values).tolist()
        found[term.name, term.step] = dict(zip(keys, weighted, strict=True))
    assert batch.counts[: 1 + max(step for _, step in found)] == [
        len(found["tokens", step]) for step in sorted({step for _, step in found})
    ]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return stored(random_samples(8, seed=5), tmp_path_factory.mktemp("eagle"))


@torch.inference_mode()
def naive(head: Eagle, sample: StoredSample, o: EagleLossOptions, steps: int) -> list[dict[int, tuple[float, float]]]:
    """(feature, token) losses of each chain that counts: drafted by `observe` and `expand`, judged in float64 by the
    target's own logits and states on the text."""
    target = tiny_target()
    out = target.model(input_ids=sample.ids[None], output_hidden_states=True)
    log_p = out.logits[0].double().log_softmax(-1)[:, head.vocab.target_ids]
    true = out.hidden_states[-1][0].double()
    weight = target.model.get_output_embeddings().weight.double()[head.vocab.target_ids]
    found: list[dict[int, tuple[float, float]]] = [{} for _ in range(steps)]
    mask, ids = sample.mask.tolist(), sample.ids
    for p in range(len(ids)):
        if not counts(mask, p, 0):
            continue
        state = head.start(1, len(ids) + steps)
        # token x_{t+1} goes in with the state f_t that produced it
        seen = torch.cat([true[:1], true[: p + 1]]).float()[None]
        head.observe(state, ids[None, : p + 2], seen, [p + 2])
        drafted = state.root[0]
        for step in range(steps):
            if not counts(mask, p, step):
                break
            if step:
                head.expand(state, Frontier(ids[p + 1 + step][None, None], torch.tensor([[step - 2]]), step))
                drafted = state.hidden[0, -1]
            error = (drafted.double() - true[p + 1 + step]).abs()
            smooth = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
            log_q = (weight @ drafted.double()).log_softmax(-1)
            p_log_q = log_p[p + 1 + step].exp() * log_q
            tokens = -o.token_weight * p_log_q.sum()
            if isinstance(o, HassLossOptions):
                likeliest = log_p[p + 1 + step].argsort(descending=True)[: o.top_k]
                tokens = tokens - o.top_k_weight * p_log_q[likeliest].sum()
            found[step][p] = (float(o.feature_weight * smooth), float(tokens))
    return found


@pytest.mark.parametrize("vocab", [PART, VocabMap.identity(VOCAB)], ids=["part", "whole"])
@pytest.mark.parametrize("kind", ["eagle", "hass"])
def test_the_losses_are_those_of_each_chain_alone(source: FeatureStore, kind: str, vocab: VocabMap) -> None:
    head = tiny_eagle(vocab=vocab)
    other = {"feature_weight": 0.7, "token_weight": 0.3, "noise": 0.0}
    more = {"top_k_weight": 0.6, "step_decay": 0.5} if kind == "hass" else {}
    objective = objective_of(kind, head, **other, **more)
    steps = 3 if kind == "hass" else 1
    names = source.ids
    rows = [[source[i] for i in names[:3]], [source[i] for i in names[3:4]], [source[i] for i in names[4:]]]
    with torch.no_grad():
        found = values(objective, rows)
    assert found.keys() == {(name, step) for name in ("feature", "tokens") for step in range(steps)}
    compared = 0
    for number, name in enumerate(names):
        for step, expected in enumerate(naive(head, source[name], objective.options, steps)):
            share = 0.5**step / steps  # β^(j − 1) / n
            for term, place in (("feature", 0), ("tokens", 1)):
                own = {p: value for (owner, p), value in found[term, step].items() if owner == number}
                assert own.keys() == expected.keys()
                for p, value in own.items():
                    assert value == pytest.approx(share * expected[p][place], abs=5e-5, rel=5e-5)
                    compared += 1
    assert compared > (120 if kind == "hass" else 60)
    assert all(found.values()), "every step has some that count"


@pytest.mark.parametrize("kind", ["eagle", "hass"])
def test_rows_are_compared_by_their_token_loss_in_both_terms(source: FeatureStore, kind: str) -> None:
    """Feature and token terms of a step keep the same rows of a reference's: those of the token loss."""
    objective = objective_of(kind, tiny_eagle(vocab=PART), noise=0.0)
    with torch.no_grad():
        terms = list(objective.losses(objective.collate([[source[i] for i in source.ids]], CPU), (0, 7)))
    tokens = {term.step: term.values for term in terms if term.name == "tokens"}
    assert len(terms) == 2 * len(tokens)
    for term in terms:
        assert torch.equal(compared(term), tokens[term.step])


def dense_hass(head: Eagle, sample: StoredSample, steps: int) -> list[Tensor]:
    """HASS's alignment as the paper draws it, on a whole text: predicted states `[T − 1, H]` of each step.

    Step k reads, at every t, the state that step k − 1 predicted for t (its row t − 1; the target's where there is
    none), with the token after t. Its query at t sees the key at s = t − i made of what step k − i predicted for s, for
    i < k, and the target's true states before that: one dense `[T, T]` attention a step, whose i-th diagonal comes from
    other keys.
    """
    ids, true = sample.ids, sample.hidden["final"].float()
    length = len(ids) - 1
    o, layer = head.options, head.layers[0]
    groups = o.num_attention_heads // o.num_key_value_heads
    positions = torch.arange(length)[None]
    head.rotary.reach(length + 1, CPU)
    embeds = head.embed(ids[1:])
    reads = [true[:length]]
    predicted: list[Tensor] = []
    keys: list[Tensor] = []
    own_values: list[Tensor] = []
    for k in range(steps):
        x = head.fc(torch.cat([embeds, reads[k]], dim=-1))[None]
        attention = layer.self_attn  # type: ignore[union-attr]
        q = head.rotary.turn(attention.heads(attention.q_proj(x)), positions)[0]  # type: ignore[union-attr, operator]
        key, value = head.keys_values(x, positions)
        keys.append(key[0].repeat_interleave(groups, 0))
        own_values.append(value[0].repeat_interleave(groups, 0))
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        scores = torch.full((o.num_attention_heads, length, length), -torch.inf)
        for t in range(length):
            for s in range(t + 1):
                source = max(k - int(distance[t, s]), 0)  # which step's keys stand at s in t's eyes
                scores[:, t, s] = (q[:, t] * keys[source][:, s]).sum(-1) * o.head_dim**-0.5
        weights = scores.softmax(-1)
        mixed = torch.zeros(o.num_attention_heads, length, o.head_dim)
        for t in range(length):
            for s in range(t + 1):
                mixed[:, t] += weights[:, t, s, None] * own_values[max(k - int(distance[t, s]), 0)][:, s]
        predicted.append(head.rest(x, mixed[None])[0])
        reads.append(torch.cat([reads[k][:1], predicted[k][:-1]]))
    return predicted


@torch.no_grad()
def test_hass_masks_equal_dense_attention_step_by_step(source: FeatureStore) -> None:
    head, steps = tiny_eagle(), 3
    samples = [source[i] for i in source.ids if source[i].mask.sum() > 3][:3]
    batch = collated([samples[:2], samples[2:]], steps, CPU)
    dense = [dense_hass(head, sample, steps) for sample in samples]
    unroll, compared = batch.rows.unroll, 0
    for out in head.unroll(unroll, steps):
        for row, start in batch.rows.counted[out.step].nonzero().tolist():
            p = int(unroll.positions[row, unroll.starts[row, start]])
            expected = dense[int(batch.rows.samples[row, start])][out.step][p + out.step]
            torch.testing.assert_close(out.states[row, start], expected, atol=2e-5, rtol=2e-4)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("kind", ["eagle", "hass"])
def test_packed_equals_alone_with_noise(source: FeatureStore, kind: str) -> None:
    """The noise is the sample's own, wherever it stands."""
    objective = objective_of(kind, tiny_eagle(vocab=PART), noise=0.5)
    names = [i for i in source.ids if objective.teaches(source[i])]
    assert len(names) > 4
    with torch.no_grad():
        packed = values(objective, [[source[i] for i in names[:3]], [source[i] for i in names[3:]]])
        quiet = values(objective_of(kind, objective.head, noise=0.0), [[source[i] for i in names]])
        assert packed["tokens", 0] != pytest.approx(quiet["tokens", 0], rel=1e-2), "noise does something here"
        for number, name in enumerate(names):
            alone = values(objective, [[source[name]]])
            for term, found in packed.items():
                own = {p: value for (owner, p), value in found.items() if owner == number}
                expected = {p: value for (_, p), value in alone[term].items()}
                assert own == pytest.approx(expected, abs=1e-6, rel=2e-6)


def test_noise_has_the_papers_scale_and_its_own_keys(source: FeatureStore) -> None:
    rows = [[source[i] for i in source.ids[:4]], [source[i] for i in source.ids[4:]]]
    batch = collated(rows, 1, CPU)
    before = batch.rows.unroll.features
    difference = disturbed(batch, 0.2, (0, 3)).unroll.features - before
    segments = batch.rows.unroll.segments
    for number, name in enumerate(source.ids):
        own = difference[segments == number]
        bound = 0.5 * 0.2 * 512 / len(source[name].ids)
        assert 0.9 * bound < float(own.abs().max()) <= bound * (1 + 1e-4)
        assert float(own.mean()) == pytest.approx(0, abs=0.15 * bound)
        assert float(own.std()) == pytest.approx(2 * bound / 12**0.5, rel=0.15)
    assert not difference[segments < 0].any()
    again, later = (disturbed(batch, 0.2, (0, step)) for step in (3, 4))
    assert torch.equal(again.unroll.features, before + difference)
    assert float((later.unroll.features - again.unroll.features).abs().max()) > 0.1
    assert torch.equal(later.final, batch.rows.final), "what is taught is not disturbed"


def known_sample(ids: list[int], mask: list[bool]) -> StoredSample:
    """A target that knows its next token: its final state at t is 50 · onehot(x_{t+1}), its output the identity."""
    following = torch.tensor([*ids[1:], 0])
    final = 50.0 * F.one_hot(following, VOCAB).float()
    return StoredSample(
        id="known",
        ids=torch.tensor(ids),
        mask=torch.tensor(mask),
        complete=True,
        hidden={"final": final},
        statistics={"log_z": torch.logsumexp(final, -1)},
    )


class Knowing:
    """What `Taught` asks of a head: the output of `known_sample`'s target."""

    output = torch.eye(VOCAB)

    def judged(self, states: Tensor) -> Tensor:
        return states


def test_what_is_taught_is_the_token_after_the_one_read() -> None:
    """With a target that knows its next token, step k at p is taught f_{p+1+k} and to be sure of x_{p+2+k}."""
    ids = [20 + i for i in range(12)]
    mask = [False] * 4 + [True] * 5 + [False] * 3
    batch = collated([[known_sample(ids, mask)]], 3, CPU)
    starts = batch.rows.unroll.starts
    everything = set()
    for step in range(3):
        right = batch.rows.final.gather(1, (starts + 1 + step).clamp(max=11)[..., None].expand(-1, -1, VOCAB))
        head: Any = Knowing()
        rows = Taught(head, head.output, batch.rows, StepOut(step, right))
        assert float(rows.feature().abs().max()) == 0
        taught = []

        def judge(log_p: Tensor, log_q: Tensor, taught: list[int] = taught) -> Tensor:
            assert torch.equal(log_p.argmax(-1), log_q.argmax(-1))
            taught.extend(log_p.argmax(-1).tolist())
            return log_q.sum(-1)

        values = rows.tokens(judge)
        counted = [p for p in range(12) if counts(mask, p, step)]
        assert len(values) == len(counted)
        # rows that fill a block up stand behind the real ones
        assert taught[: len(counted)] == [ids[p + 2 + step] for p in counted]
        assert len(counted) == 4 - step, "nothing beyond the answer's end, nothing about its first token"
        everything |= set(taught[: len(counted)])
    assert everything == {ids[i] for i in range(5, 9)}


def test_eagles_loss_is_the_first_phase_of_hass(source: FeatureStore) -> None:
    head, rows = tiny_eagle(), [[source[i] for i in source.ids]]
    hass = HassObjective(head, HassLossOptions(first_phase=5))
    with torch.no_grad():
        first, second = values(hass, rows, (0, 4)), values(hass, rows, (0, 5))
        eagle = values(EagleObjective(head, EagleLossOptions()), rows, (0, 4))
    assert first == eagle
    assert {step for _, step in second} == {0, 1, 2}


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_flows_between_steps_only_if_asked(source: FeatureStore, detach: bool) -> None:
    """The last step's loss reaches the first step's state, or not; the target's output never learns."""
    head = tiny_eagle().train()
    kept: list[Tensor] = []
    rest = head.rest

    def remember(residual: Tensor, mixed: Tensor) -> Tensor:
        kept.append(rest(residual, mixed))
        return kept[-1]

    head.rest = remember  # type: ignore[method-assign]
    objective = objective_of("hass", head, detach_steps=detach)
    terms = list(objective.losses(objective.collate([[source[i] for i in source.ids]], CPU), (0, 0)))
    last = sum(term.values.sum() for term in terms if term.step == 2)
    assert isinstance(last, Tensor)
    (gradient,) = torch.autograd.grad(last, kept[0], allow_unused=True, retain_graph=True)
    assert (gradient is None) == detach
    torch.stack([term.values.sum() for term in terms]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    assert head.output.grad is None


BY_HEART: dict[str, dict[str, float]] = {
    "eagle": {"noise": 0.004},
    # The random target is nearly flat: distilling its likeliest ten of 96 tokens swaps those that nearly tie.
    "hass": {"noise": 0.004, "top_k": 1},
}


@pytest.mark.parametrize("kind", BY_HEART)
def test_a_head_learns_eight_answers_by_heart(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """α₁ ≥ 0.95 on them within 300 steps; HASS, which is taught to go on from its own states, drafts deeper."""
    target = tiny_target()
    source = stored(answered(8, 12), tmp_path_factory.mktemp("by-heart"))
    head = tiny_eagle(seed=1, initializer_range=0.02)
    head.begin()
    dev = [stored_answer(sample) for sample in source]

    def drafted() -> list[float]:
        return metrics.count(replay(Single(head.eval(), ChainGrowth(3)), target.spec, dev)).acceptance_by_depth

    assert drafted()[0] < 0.6, "a head that knows nothing yet would make this test worthless"
    objective = objective_of(kind, head, **BY_HEART[kind])
    batch = objective.collate([[source[i] for i in source.ids[:4]], [source[i] for i in source.ids[4:]]], CPU)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(300):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / 300)
        loss = torch.stack([t.weight * t.values.mean() for t in objective.losses(batch, (0, step))]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = drafted()
    assert found[0] >= 0.95
    if kind == "hass":
        assert min(found) >= 0.9


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 8"):
        HassLossOptions(steps=9)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        EagleLossOptions(noise=-0.1)
