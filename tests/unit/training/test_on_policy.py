"""Texts that the draft writes itself: what is written, what the target reads of it, when it is written anew, and that a
killed run goes on to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.data.features import FeatureStore, PassOptions, StoredSample
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.standalone import Standalone
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation.errors import UserError
from draftsmith.numerics.losses import forward_kl
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training import on_policy, trainer
from draftsmith.training.account import Account
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.distillation import DistillationObjective
from draftsmith.training.on_policy import OnPolicySource
from draftsmith.training.options import OnPolicyOptions, TrainOptions
from draftsmith.training.trainer import train
from tests.tiny import END, VOCAB, NoTokenizer, tiny_draft, tiny_target
from tests.unit.training.stored import answered, stored

PART = VocabMap(torch.tensor([END, *range(20, VOCAB)]), VOCAB)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return stored(answered(8, 16), tmp_path_factory.mktemp("on-policy"))


def source(store: FeatureStore, draft: Standalone, account: Account | None = None, **options: object) -> OnPolicySource:
    made = OnPolicyOptions.model_validate({"share": 1.0, "max_new_tokens": 10, "replay_steps": 3, **options})
    passes = PassOptions(batch_positions=80)
    return OnPolicySource(store, draft, tiny_target(), made, passes, 5, account or Account())


def prompt(sample: StoredSample) -> list[int]:
    answer = stored_answer(sample)
    return list(answer.ids[: answer.prompt_length])


def test_the_draft_writes_what_it_would_decode_by_itself(store: FeatureStore) -> None:
    """Against the engine's plain decoding with the draft as the model, prompts of different lengths in one batch."""
    draft = tiny_draft("llama", 3)
    alone = HFTarget(tiny_draft("llama", 3).model, NoTokenizer(), "alone")
    names = list(store.ids)
    found = source(store, draft, temperature=0.0).fetch(names, 0)
    prompts = [prompt(store[name]) for name in names]
    written = Engine(alone).generate(prompts, Sampling(), 10)
    for name, asked, sample, expected in zip(names, prompts, found, written, strict=True):
        assert sample.id == name
        assert sample.ids.tolist() == [*asked, *expected.token_ids]
        assert sample.mask.tolist() == [False] * len(asked) + [True] * len(expected.token_ids)
        assert sample.complete == (expected.finish == "stop")


def test_the_target_reads_it_as_it_would_any_text(store: FeatureStore) -> None:
    target = tiny_target()
    for sample in source(store, tiny_draft("llama", 3)).fetch(list(store.ids), 0):
        logits = target.model(input_ids=sample.ids[None]).logits[0].float()
        torch.testing.assert_close(sample.statistics["log_z"], logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
        final = target.model.base_model(input_ids=sample.ids[None]).last_hidden_state[0]
        torch.testing.assert_close(sample.hidden["final"], final, atol=1e-4, rtol=1e-4)


def test_a_reduced_vocabulary_writes_its_own_tokens_only(store: FeatureStore) -> None:
    found = source(store, tiny_draft("llama", 3, PART), temperature=2.0).fetch(list(store.ids), 0)
    written = torch.cat([s.ids[s.mask] for s in found])
    assert torch.isin(written, PART.target_ids).all()
    assert len(written.unique()) > 20


def test_draws_are_keyed_by_seed_step_and_prompt(store: FeatureStore) -> None:
    draft = tiny_draft("llama", 3)
    names = list(store.ids)
    torch.manual_seed(1)
    first = [s.ids.tolist() for s in source(store, draft).fetch(names, 4)]
    torch.manual_seed(2)
    alone = [source(store, draft).fetch([name], 4)[0].ids.tolist() for name in names]
    assert first == alone
    assert first != [s.ids.tolist() for s in source(store, draft).fetch(names, 5)]


def test_answers_are_used_again_until_they_are_too_old(store: FeatureStore) -> None:
    draft = tiny_draft("llama", 3)
    account = Account()
    made = source(store, draft, account)
    names = list(store.ids)[:3]
    by_step = [[s.ids.tolist() for s in made.fetch(names, step)] for step in range(5)]
    assert by_step[0] == by_step[1] == by_step[2]
    assert by_step[3] != by_step[0]
    assert by_step[3] == by_step[4]
    assert by_step[3] == [s.ids.tolist() for s in source(store, draft).fetch(names, 3)]
    # one pass over the prompts and one for each further token of the longest answer, twice
    longest = [max(len(ids) - len(prompt(store[n])) for n, ids in zip(names, by_step[s], strict=True)) for s in (0, 3)]
    assert account.counts["draft"]["written"]["passes"] == sum(longest)
    assert account.counts["target"]["read"]["tokens"] == sum(len(ids) for step in by_step for ids in step)


def test_a_mixed_source_takes_some_of_each(store: FeatureStore) -> None:
    draft = tiny_draft("llama", 3)
    own = 0
    for step in range(12):
        made = source(store, draft, share=0.25)
        for sample in made.fetch(list(store.ids), step):
            own += sample.ids.tolist() != store[sample.id].ids.tolist()
    assert 12 <= own <= 40
    none = source(store, draft, share=0.0).fetch(list(store.ids), 0)
    assert [s.ids.tolist() for s in none] == [s.ids.tolist() for s in store]


def test_planned_lengths_hold_what_may_be_written(store: FeatureStore) -> None:
    made = source(store, tiny_draft("llama", 3), max_new_tokens=30)
    for length, sample in zip(made.lengths, made.fetch(list(store.ids), 0), strict=True):
        assert len(sample.ids) <= length
        assert length == len(prompt(store[sample.id])) + 30
    assert source(store, tiny_draft("llama", 3), share=0.0).lengths == store.lengths


def test_several_processes_are_refused(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_policy.ranks, "world", lambda: 2)
    with pytest.raises(UserError, match="one process"):
        source(store, tiny_draft("llama", 3))
    source(store, tiny_draft("llama", 3), share=0.0)


def trained(store: FeatureStore, folder: Path, account: Account) -> dict[str, torch.Tensor]:
    draft = tiny_draft("llama", 2)
    target = tiny_target()
    weight = target.model.get_output_embeddings().weight
    made = DistillationObjective(draft, weight, forward_kl)
    changing = source(store, draft, account, share=0.7)
    dev = Dev(target.spec, [stored_answer(store[i]) for i in list(store.ids)[:2]], ChainGrowth(2))
    o = TrainOptions(steps=6, batch_positions=64, row_length=64, evaluations=3, precision="float32")
    train(draft, made, changing, list(store.ids), dev, o, folder / "drafter", folder / "log.jsonl", {}, account=account)
    return {name: p.detach().clone() for name, p in draft.named_parameters()}


def test_a_killed_run_goes_on_to_the_same_weights(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_cost, cost = Account(), Account()
    whole = trained(store, tmp_path / "whole", whole_cost)
    step = trainer._Training.step

    def killed(run: trainer._Training, parts: object, number: int, rate: float) -> object:
        if number == 4:
            raise KeyboardInterrupt
        return step(run, parts, number, rate)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(store, tmp_path / "killed", Account())
    found = trained(store, tmp_path / "killed", cost)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert cost.counts == whole_cost.counts
    assert cost.counts["draft"]["trained"]["passes"] == 6
