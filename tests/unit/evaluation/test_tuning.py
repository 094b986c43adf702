"""The tree that pays: arithmetic on given costs, and draft passes counted."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import prompts, tiny_head, tiny_target

from draftsmith.decoding import profile
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth, GrowthOptions
from draftsmith.evaluation import metrics, tuning
from draftsmith.evaluation.replayed import replay
from draftsmith.target.model import HFTarget
from draftsmith.target.replay import StoredAnswer

VERIFY = {1: 10.0, 4: 12.0, 8: 14.0, 16: 20.0}
OBSERVE, EXPAND = 1.5, 2.0


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def draft_cost(target: HFTarget, composition: Composition) -> float:
        assert isinstance(composition, Single)
        assert isinstance(composition.growth, DynamicGrowth)
        assert not composition.growth.least_mass, "a tree that may stop has no one cost"
        return OBSERVE + EXPAND * (composition.growth.depth - 1)

    monkeypatch.setattr(profile, "verify_cost", lambda target: dict(VERIFY))
    monkeypatch.setattr(profile, "draft_cost", draft_cost)


def stored(count: int, seed: int) -> list[StoredAnswer]:
    target = tiny_target()
    found = []
    for prompt in prompts(count, seed=seed):
        text = [*prompt, *Engine(target).generate([prompt], None, 20)[0].token_ids]
        hidden = target.read(torch.tensor([text]), [len(text)], tiny_head().wants)
        found.append(StoredAnswer(text, len(prompt), {k: h[0] for k, h in hidden.items()}))
    return found


@pytest.mark.usefixtures("costs")
def test_speed_up_is_length_over_cost_of_each_set_and_the_geometric_mean_decides() -> None:
    target, head = tiny_target(), tiny_head()
    answers = {"one": stored(3, 1), "other": stored(3, 2)}
    small, large = GrowthOptions(node_budget=3, depth=2, width=2), GrowthOptions(node_budget=15, depth=4, width=4)
    found = tuning.tuned(target, head, answers, [large, small])
    for tree, verify, draft in ((found.trees[0], 20.0, 7.5), (found.trees[1], 12.0, 3.5)):
        for name, own in answers.items():
            length = metrics.count(replay(Single(head, tree.growth.build()), target.spec, own)).acceptance_length
            assert tree.acceptance_length[name] == length
            assert tree.speedup[name] == pytest.approx(length * 10.0 / (verify + draft))
        assert tree.expected == pytest.approx((tree.speedup["one"] * tree.speedup["other"]) ** 0.5)
    assert found.best is max(found.trees, key=lambda tree: tree.expected)
    assert found.best.growth == small, "a random head's large tree can't pay"


@pytest.mark.usefixtures("costs")
def test_passes_that_are_spared_are_not_charged() -> None:
    target, head = tiny_target(), tiny_head()
    answers = {"one": stored(4, 3)}
    growths = [GrowthOptions(node_budget=7, depth=3, width=3, least_mass=mass) for mass in (0.0, 1e-9, 0.2, 0.999)]
    always, nearly, sometimes, never = (t.draft_ms["one"] for t in tuning.tuned(target, head, answers, growths).trees)
    assert always == OBSERVE + 2 * EXPAND
    assert OBSERVE + EXPAND < nearly <= always, "the last tokens of an answer leave no room for a second pass"
    assert OBSERVE < sometimes < nearly
    assert never == OBSERVE


@pytest.mark.usefixtures("costs")
def test_a_set_without_a_round_decides_nothing() -> None:
    target = tiny_target()
    one = stored(2, 4)
    prompt = prompts(1, seed=9)[0]
    hidden = {k: h[: len(prompt)] for k, h in one[0].hidden.items()}
    short = StoredAnswer(
        [*prompt, 9], len(prompt), {k: torch.zeros(len(prompt) + 1, h.shape[1]) for k, h in hidden.items()}
    )
    found = tuning.tuned(
        target, tiny_head(), {"one": one, "none": [short]}, [GrowthOptions(node_budget=3, depth=2, width=2)]
    )
    assert set(found.best.speedup) == {"one"}
