"""The EAGLE-3 objective: what it teaches, against a naive loss in float64, chain by chain; packing changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from draftsmith.data.features import FeatureStore, StoredSample
from draftsmith.drafters.base import Frontier
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.unrolled import StepOut
from draftsmith.foundation.errors import UserError
from draftsmith.numerics.losses import forward_kl, total_variation
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.batches import collate
from draftsmith.training.objectives.base import compared
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from tests.tiny import END, VOCAB, NoTokenizer, tiny_head, tiny_target
from tests.unit.training.stored import WANT, random_samples, stored
from tests.unit.training.test_batches import counts

STEPS = 3
CPU = torch.device("cpu")
PART = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)


def teacher_weight(vocab: VocabMap) -> Tensor:
    weight: Tensor = tiny_target().model.get_output_embeddings().weight
    return weight[vocab.target_ids]


def values_by_step(head: Eagle3, rows: list[list[StoredSample]]) -> list[dict[tuple[int, int], float]]:
    """The objective's losses by (sample, position) for each unrolled step, whatever the packing."""
    batch = collate(rows, head.wants, STEPS, torch.device("cpu"))
    objective = Eagle3Objective(head, teacher_weight(head.vocab), forward_kl, block_rows=5)
    found = []
    for out in head.unroll(batch.unroll, STEPS):
        values, where = objective.token_losses(out, batch)
        starts = batch.unroll.starts[where[:, 0], where[:, 1]]
        owners = batch.samples[where[:, 0], where[:, 1]]
        places = batch.unroll.positions[where[:, 0], starts]
        keys = zip(owners.tolist(), places.tolist(), strict=True)
        found.append(dict(zip(keys, values.tolist(), strict=True)))
    return found


@torch.inference_mode()
def naive(head: Eagle3, sample: StoredSample) -> list[dict[int, float]]:
    """Σ p·(log p − log q) in float64 for each chain that counts: drafted by `observe` and `expand`, judged by the
    target's own logits on the text."""
    target = tiny_target()
    ids = sample.ids.tolist()
    logits = target.model(input_ids=sample.ids[None]).logits[0].double()
    log_p = logits.log_softmax(-1)[:, head.vocab.target_ids]
    features = torch.cat([sample.hidden[k] for k in head.wants.layers], dim=-1)
    found: list[dict[int, float]] = [{} for _ in range(STEPS)]
    mask = sample.mask.tolist()
    for p in range(len(ids)):
        if not counts(mask, p, 0):
            continue
        state = head.start(1, len(ids) + STEPS)
        # token x_{t+1} goes in with the state h_t that produced it
        seen = torch.cat([features[:1], features[: p + 1]])[None]
        log_q = head.observe(state, sample.ids[None, : p + 2], seen, [p + 2]).log_q[0, 0]
        for step in range(STEPS):
            if not counts(mask, p, step):
                break
            if step:
                frontier = Frontier(sample.ids[p + 1 + step][None, None], torch.tensor([[step - 2]]), step)
                log_q = head.expand(state, frontier).log_q[0, 0]
            row = log_p[p + 1 + step]
            found[step][p] = float((row.exp() * (row - log_q.double())).sum())
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return stored(random_samples(8, seed=5), tmp_path_factory.mktemp("objective"))


@pytest.mark.parametrize("vocab", [PART, VocabMap.identity(VOCAB)], ids=["part", "whole"])
def test_the_losses_are_those_of_each_chain_alone(source: FeatureStore, vocab: VocabMap) -> None:
    head = tiny_head(vocab=vocab)
    names = source.ids
    rows = [[source[i] for i in names[:3]], [source[i] for i in names[3:4]], [source[i] for i in names[4:]]]
    with torch.no_grad():
        found = values_by_step(head, rows)
    compared = 0
    for number, name in enumerate(names):
        for step, expected in enumerate(naive(head, source[name])):
            own = {p: value for (owner, p), value in found[step].items() if owner == number}
            assert own.keys() == expected.keys()
            for p, value in own.items():
                assert value == pytest.approx(expected[p], abs=2e-5, rel=2e-5)
                compared += 1
    assert compared > 60
    assert all(found), "every unrolled step has some that count"


def test_packed_equals_alone(source: FeatureStore) -> None:
    head = tiny_head(vocab=PART)
    names = [i for i in source.ids if any(counts(source[i].mask.tolist(), p, 0) for p in range(len(source[i].ids)))]
    assert len(names) > 4
    with torch.no_grad():
        packed = values_by_step(head, [[source[i] for i in names[:3]], [source[i] for i in names[3:]]])
        for number, name in enumerate(names):
            alone = values_by_step(head, [[source[name]]])
            for step in range(STEPS):
                own = {p: value for (owner, p), value in packed[step].items() if owner == number}
                expected = {p: value for (_, p), value in alone[step].items()}
                assert own == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_gradients_of_packed_rows_are_those_of_the_rows_alone(source: FeatureStore) -> None:
    """The gradient, too, may not leak from one sample of a row into another."""
    head = tiny_head(vocab=PART).train()
    names = [i for i in source.ids if source[i].mask.any()][:4]
    objective = Eagle3Objective(head, teacher_weight(PART), forward_kl)

    def gradient(rows: list[list[StoredSample]]) -> dict[str, Tensor]:
        head.zero_grad()
        batch = collate(rows, head.wants, STEPS, torch.device("cpu"))
        losses = [objective.token_losses(out, batch)[0].sum() for out in head.unroll(batch.unroll, STEPS)]
        torch.stack(losses).sum().backward()
        return {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}

    packed = gradient([[source[i] for i in names]])
    alone = [gradient([[source[i]]]) for i in names]
    assert packed.keys() == {name for name, _ in head.named_parameters()}, "every parameter learns"
    for name, value in packed.items():
        expected = sum(part[name] for part in alone)
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-4)


def one_hot_sample(ids: list[int], mask: list[bool]) -> StoredSample:
    """A target that knows its next token: its final state at t is 50 · onehot(x_{t+1}), its output the identity."""
    following = torch.tensor([*ids[1:], 0])
    final = 50.0 * torch.nn.functional.one_hot(following, VOCAB).float()
    return StoredSample(
        id="known",
        ids=torch.tensor(ids),
        mask=torch.tensor(mask),
        complete=True,
        hidden={**{k: torch.randn(len(ids), 32) for k in WANT.layers}, "final": final},
        statistics={"log_z": torch.logsumexp(final, -1)},
    )


def test_what_is_taught_is_the_token_after_the_one_read() -> None:
    """With a target that knows its next token, the teacher of step k at p is sure of x_{p+2+k}."""
    ids = [20 + i for i in range(12)]
    mask = [False] * 4 + [True] * 5 + [False] * 3
    sample = one_hot_sample(ids, mask)
    head = tiny_head()
    batch = collate([[sample]], head.wants, STEPS, torch.device("cpu"))
    taught: list[tuple[int, int]] = []

    def judge(log_p: Tensor, log_q: Tensor) -> Tensor:
        assert torch.allclose(log_p.exp().sum(-1), torch.ones(len(log_p)))
        sure = log_p.max(-1).values > -1e-3  # what fills a block up is taught nothing: its teacher is uniform
        taught.extend((step, token) for token in log_p[sure].argmax(-1).tolist())
        return log_q.sum(-1)

    objective = Eagle3Objective(head, torch.eye(VOCAB), judge)
    for step in range(STEPS):
        states = torch.zeros((*batch.unroll.starts.shape, head.options.hidden_size))
        _, where = objective.token_losses(StepOut(step, states), batch)
        starts = batch.unroll.starts[where[:, 0], where[:, 1]].tolist()
        assert [token for k, token in taught if k == step] == [ids[p + 2 + step] for p in starts]
    assert {token for _, token in taught} == {ids[i] for i in range(5, 9)}, "answer tokens but the first, and no others"


def small(config: Any) -> HFTarget:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = END
    return HFTarget(model, NoTokenizer(), "small")


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": END,
    "initializer_range": 0.25,
}


@pytest.mark.parametrize(
    "config", [GraniteConfig(**SHAPE, logits_scaling=4.0), CohereConfig(**SHAPE, logit_scale=0.5)], ids=type
)
def test_the_teacher_is_the_target_also_where_logits_are_scaled(config: Any) -> None:
    target = small(config)
    ids = torch.arange(10, 30)[None]
    logits = target.model(input_ids=ids).logits[0]
    rows = target.output_rows(PART.target_ids)
    hidden = target.read(ids, [20], FeatureSpec())["final"][0]
    found = hidden @ rows.T - logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(found, logits.log_softmax(-1)[:, PART.target_ids], atol=1e-5, rtol=1e-5)
    unscaled = hidden @ target.model.get_output_embeddings().weight[PART.target_ids].T
    assert (unscaled - logits[:, PART.target_ids]).abs().max() > 0.1, "the scale does something here"


def test_a_target_that_caps_its_logits_is_refused() -> None:
    target = small(Gemma2Config(**SHAPE, final_logit_softcapping=5.0, sliding_window=6, query_pre_attn_scalar=8))
    with pytest.raises(UserError, match="caps its logits or adds a bias"):
        target.output_rows(torch.arange(4))


@pytest.mark.parametrize("detach", [False, True])
def test_checkpointed_steps_give_the_same_losses_and_gradients(source: FeatureStore, detach: bool) -> None:
    head = tiny_head(vocab=PART).train()
    batch = collate([[source[i] for i in source.ids]], head.wants, STEPS, torch.device("cpu"))
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        head.zero_grad()
        objective = Eagle3Objective(head, teacher_weight(PART), forward_kl, STEPS, 0.5, detach, checkpointed)
        total = torch.stack([term.weight * term.values.sum() for term in objective.losses(batch, (0, 0))]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None})
        found[-1]["total"] = total.detach()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_what_token_weights_look_at(source: FeatureStore) -> None:
    """Samples, flatness and survival of each row, from the target's logits and the head's own chain, one at a time."""
    head = tiny_head(vocab=PART)
    names = source.ids
    batch = collate([[source[i] for i in names[:4]], [source[i] for i in names[4:]]], head.wants, STEPS, CPU)
    objective = Eagle3Objective(head, teacher_weight(PART), forward_kl, STEPS, survival=True, block_rows=5)
    with torch.no_grad():
        terms = list(objective.losses(batch, (0, 0)))
    compared = 0
    for term in terms:
        facts = term.facts
        assert facts.samples is not None
        assert facts.flatness is not None
        assert facts.survival is not None
        where = batch.counted[term.step].nonzero()
        for n, (row, start) in enumerate(where.tolist()):
            place = int(batch.unroll.positions[row, batch.unroll.starts[row, start]])
            sample = source[names[int(facts.samples[n])]]
            p = tiny_target().model(input_ids=sample.ids[None]).logits[0].double().softmax(-1)
            taught = p[place + 1 + term.step]
            flat = taught.sum() / (taught.norm() * VOCAB**0.5)
            assert float(facts.flatness[n]) == pytest.approx(float(flat), rel=1e-4)
            expected = 1.0
            for step in range(term.step):
                log_q = chain(head, sample, place, step)
                expected *= float(torch.minimum(p[place + 1 + step, PART.target_ids], log_q.double().exp()).sum())
            assert float(facts.survival[n]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
            compared += term.step > 0
    assert compared > 20


def test_rows_may_be_judged_by_another_divergence_than_is_trained(source: FeatureStore) -> None:
    head = tiny_head(vocab=PART)
    trained, judging = (
        Eagle3Objective(head, teacher_weight(PART), loss, STEPS, judge=judge)
        for loss, judge in ((total_variation, forward_kl), (forward_kl, None))
    )
    rows = [[source[i] for i in source.ids]]
    with torch.no_grad():
        both = zip(
            trained.losses(trained.collate(rows, CPU), ()), judging.losses(judging.collate(rows, CPU), ()), strict=True
        )
        for one, other in both:
            assert torch.equal(compared(one), other.values)
            assert not torch.equal(one.values, other.values)


@torch.inference_mode()
def chain(head: Eagle3, sample: StoredSample, p: int, steps: int) -> Tensor:
    """log q `[Vd]` after `steps` more drafted tokens of the draft that starts at p, by `observe` and `expand`."""
    features = torch.cat([sample.hidden[k] for k in head.wants.layers], dim=-1)
    state = head.start(1, len(sample.ids) + STEPS)
    seen = torch.cat([features[:1], features[: p + 1]])[None]
    log_q = head.observe(state, sample.ids[None, : p + 2], seen, [p + 2]).log_q[0, 0]
    for step in range(1, steps + 1):
        frontier = Frontier(sample.ids[p + 1 + step][None, None], torch.tensor([[step - 2]]), step)
        log_q = head.expand(state, frontier).log_q[0, 0]
    return log_q


def test_a_stored_reference_loss_is_read_where_it_is_taught(source: FeatureStore) -> None:
    head = tiny_head(vocab=PART)
    marked = []
    for number, sample in enumerate(source):
        places = torch.arange(len(sample.ids)) + 1000.0 * number
        own = {f"reference_loss.{step}": places + 100_000 * step for step in range(STEPS)}
        marked.append(replace(sample, statistics={**sample.statistics, **own}))
    batch = collate([marked[:5], marked[5:]], head.wants, STEPS, CPU)
    objective = Eagle3Objective(head, teacher_weight(PART), forward_kl, STEPS)
    for term in objective.losses(batch, (0, 0)):
        found, samples = term.facts.reference_losses, term.facts.samples
        assert found is not None
        assert samples is not None
        where = batch.counted[term.step].nonzero()
        starts = batch.unroll.starts[where[:, 0], where[:, 1]]
        places = batch.unroll.positions[where[:, 0], starts] + 1 + term.step
        assert torch.equal(found, (100_000 * term.step + 1000 * samples + places).float())
    bare = Eagle3Objective(head, teacher_weight(PART), forward_kl, STEPS)
    half = collate([marked[:1], [source[1]]], head.wants, STEPS, CPU)
    assert all(term.facts.reference_losses is None for term in bare.losses(half, (0, 0))), "only where all hold it"
