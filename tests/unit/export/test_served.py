"""`check --served` against a server of our own making: equal numbers where all is in order, and every gap's cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftsmith.commands import handover
from draftsmith.decoding.engine import Engine
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.export import server_counts
from draftsmith.export.adapter import golden, head_checkpoint, target_card
from draftsmith.export.checkpoint import Extras, Serving
from draftsmith.export.findings import Finding
from draftsmith.export.hand_over import export
from draftsmith.export.served import Asking, Comparison, Endless, causes, compare, serving_of
from draftsmith.export.weights import read_config
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.vocabulary import VocabMap
from tests.integration.tiny_folder import VOCAB, write_target
from tests.tiny import OracleDrafter, prompts
from tests.unit.export.fake_vllm import FakeVllm, running, walked

CHAIN, TOKENS, DIAL = 3, 24, 0.7
WRITTEN = 99
NUMBERS = Serving(tokens=CHAIN, depth=4, top_k=3, nodes=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer has a few tokens less than its vocabulary, which a server refuses: it never writes those."""
    out = write_target(tmp_path_factory.mktemp("target"))
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.lm_head.weight[WRITTEN:] = 0.0
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def target(folder: Path) -> HFTarget:
    return load_target(folder, dtype="float32", device="cpu")


class Scene:
    """Prompts, what the server answers, and an oracle drafter that is right with probability `DIAL`."""

    def __init__(self, target: HFTarget, count: int = 12, *, wrong_every: int = 0) -> None:
        self.target = target
        asked = prompts(count, WRITTEN)
        plain = {tuple(p): a for p, a in zip(asked, self.greedy(asked, TOKENS), strict=True)}
        if wrong_every:
            for answer in plain.values():
                answer[::wrong_every] = [(token + 1) % WRITTEN for token in answer[::wrong_every]]
        # The oracle knows texts by their place in a replay's batch, which goes from long to short.
        after = dict(zip(plain, self.greedy([[*p, *a] for p, a in plain.items()], 12), strict=True))
        order = sorted(plain, key=lambda p: -(len(p) + len(plain[p])))
        self.prompts = [list(p) for p in order]
        self.answers = plain
        self.texts = [[*p, *plain[p], *after[p]] for p in order]
        self.drafter = OracleDrafter(self.texts, DIAL, VocabMap.identity(VOCAB))

    def greedy(self, asked: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        on = self.target if tokens == TOKENS else Endless(self.target)
        return [Engine(on).generate([p], max_new_tokens=tokens)[0].token_ids for p in asked]

    def agrees(self, prompt: Sequence[int], dial: float = DIAL) -> list[bool]:
        """Whether the oracle's first choice for each token from the answer's first on is right, by its own rule."""
        b = self.prompts.index(list(prompt))
        places = range(len(prompt), len(self.texts[b]))
        right = [seeding.key("dial", 0, b, place) % 10_000 / 10_000 < dial for place in places]
        return right + [False] * CHAIN

    def server(self, chain: int = CHAIN, dial: float = DIAL, **how: Any) -> FakeVllm:
        def answer(prompt: list[int], limit: int) -> tuple[list[int], str, list[int]]:
            ids = self.answers[tuple(prompt)]
            reason = "stop" if ids[-1] in self.target.spec.eos_ids else "length"
            return ids, reason, walked(self.agrees(prompt, dial), len(ids), chain)

        return FakeVllm(answer, chain, **how)

    def compare(self, server: FakeVllm, promised: int | None = CHAIN) -> Comparison:
        with running(server):
            return compare(server.url, self.target, self.drafter, Asking(self.prompts, TOKENS), NUMBERS, promised)


@pytest.fixture(scope="module")
def scene(target: HFTarget) -> Scene:
    return Scene(target)


def errors(found: Comparison) -> list[Finding]:
    return [f for f in causes(found) if f.severity == "error"]


def test_equal_where_all_is_in_order(scene: Scene) -> None:
    found = scene.compare(scene.server())
    assert found.served.accepted == found.chain.accepted > 20
    assert found.served.rounds == found.chain.rounds
    assert list(found.served.at_depth) == list(found.chain.accepted_at_depth)
    assert all(n > 0 for n in found.served.at_depth)
    assert any(ids[-1] in scene.target.spec.eos_ids for ids in scene.answers.values())
    assert found.far == 0
    assert errors(found) == []


def test_counters_that_follow_a_moment_later_are_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_counts, "PAUSE", 0.0)
    server = scene.server(lag=3)
    assert errors(scene.compare(server)) == []
    assert server.looks > 4


def test_a_tree_and_a_cut_are_named_as_what_they_are(scene: Scene) -> None:
    found = scene.compare(scene.server())
    assert found.tree.acceptance_length > found.chain.acceptance_length * 1.05
    told = [f for f in causes(found) if f.severity == "warning"]
    assert any(f.problem.startswith("chain or tree: on these texts a tree of 9 nodes") for f in told)
    assert any(f.problem.startswith("before or after the cut") for f in told)
    kept = sum(len(ids) - 1 for ids in scene.answers.values())
    assert found.chain.acceptance_length_after_cut == pytest.approx(kept / found.chain.rounds)
    assert [round(length, 3) for _, length in found.rows()][:2] == [round(found.served.acceptance_length, 3)] * 2


def test_another_number_of_tokens_is_named(scene: Scene) -> None:
    found = scene.compare(scene.server(chain=2))
    assert found.chain.accepted_at_depth == found.served.at_depth
    (told,) = [f for f in causes(found) if f.problem.startswith("speculative tokens")]
    assert "drafts 2 tokens a round, the export's command says 3" in told.problem
    assert not any("speculative tokens" in f.problem for f in causes(scene.compare(scene.server(chain=2), None)))


def test_a_drafter_that_fares_worse_from_the_first_token_on(scene: Scene) -> None:
    (error,) = errors(scene.compare(scene.server(dial=0.4)))
    assert "already the first drafted token" in error.problem
    assert "auxiliary layers" in error.fix


def test_a_drafter_that_fares_worse_further_down(scene: Scene) -> None:
    server = scene.server()
    plain = server.answer

    def shallow(prompt: list[int], limit: int) -> tuple[list[int], str, list[int]]:
        ids, reason, rounds = plain(prompt, limit)
        return ids, reason, [min(n, 1) for n in rounds]

    server.answer = shallow
    (error,) = errors(scene.compare(server))
    assert "later ones do not" in error.problem


def test_a_server_that_accepts_more_than_the_drafter_can(scene: Scene) -> None:
    (error,) = errors(scene.compare(scene.server(dial=0.95)))
    assert "another drafter" in error.problem


def test_another_targets_text(target: HFTarget) -> None:
    scene = Scene(target, wrong_every=4)
    found = scene.compare(scene.server())
    assert found.far > 0.1 * found.tokens
    (error,) = errors(found)
    assert error.problem.startswith("numerics or another target")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"others": 2}, "others use it meanwhile"),
        ({"speculates": False}, "does not speculate"),
        ({"ids": False}, "no token ids"),
        ({"page": "sglang:spec_accept_length 2.0\n"}, "no counters of vLLM's"),
    ],
)
def test_what_can_not_be_compared(scene: Scene, how: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        scene.compare(scene.server(**how))


def test_a_server_that_drafts_nothing(scene: Scene) -> None:
    server = scene.server()
    plain = server.answer
    server.answer = lambda prompt, limit: (*plain(prompt, limit)[:2], [])
    with pytest.raises(UserError, match="drafted nothing"):
        scene.compare(server)


def test_no_server() -> None:
    with pytest.raises(UserError, match="no server can be reached"):
        server_counts.read("http://127.0.0.1:9")


def test_the_difference_of_two_looks() -> None:
    before = server_counts.ServerCounts(3, 9, 2, (2,), 10)
    after = server_counts.ServerCounts(7, 21, 9, (5, 3, 1), 30)
    assert after - before == server_counts.ServerCounts(4, 12, 7, (3, 3, 1), 20)
    assert (after - before).acceptance_length == 1 + 7 / 4
    assert (after - before).tokens == 3


def test_the_command(folder: Path, target: HFTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folder, target and server: the table and the exit, for a head that is right and one that is not."""
    options = eagle3_options(target.model.config, target.spec, VOCAB)
    torch.manual_seed(1)
    head = Eagle3(options, VocabMap.identity(VOCAB), target.embedding)
    checkpoint = head_checkpoint(head, target_card(target, str(folder)))
    extras = Extras(serving=NUMBERS, golden=golden(checkpoint, target))
    exported = export(checkpoint, "vllm", tmp_path / "out", extras)
    assert serving_of(read_config(exported.folder)) == (NUMBERS, CHAIN)
    asked: list[list[int]] = []

    def answer(prompt: list[int], limit: int) -> tuple[list[int], str, list[int]]:
        asked.append(prompt)
        (plain,) = Engine(target).generate([prompt], max_new_tokens=limit)
        return plain.token_ids, plain.finish, [1] * len(plain.token_ids)

    with running(FakeVllm(answer, CHAIN)) as server:
        sound = handover.check(exported.folder, str(folder), "float32", server.url, limit=2, tokens=6)
    out = capsys.readouterr().out
    assert not sound
    assert len(asked) == 2
    assert "tokens a round" in out
    assert "error: acceptance: a chain of 3 accepts 2.000 served" in out


def test_what_an_import_says_of_its_numbers() -> None:
    assert serving_of({}) == (Serving(), None)
    assert serving_of({"draftsmith": {"serving": {"tokens": 5, "depth": "x"}}}) == (Serving(tokens=5), 5)
    assert replace(Serving(), tokens=5).depth == Serving().depth
