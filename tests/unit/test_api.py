"""The public interface: what goes in, what comes out, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import draftsmith
from draftsmith.api import Model, Stream, load, run_growth, run_target
from draftsmith.data.conversations import Message
from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, GrowthOptions
from draftsmith.drafters import checkpoint
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.target import chat
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.talking import Memory, answers, conversation, talking_target

NEW = 20
ASKED = [conversation("a", "How are you?"), conversation("b", "Count: 🙂 é"), conversation("c", "Hi")]
MESSAGES = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def drafting() -> Model:
    """A model with a drafter that knows the greedy answers and errs now and then."""
    target = talking_target()
    return Model(target, Single(Memory(answers(target, ASKED, NEW)), DynamicGrowth(7, 3, 3)))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talking target as a folder."""
    folder = tmp_path_factory.mktemp("models") / "talking"
    target = talking_target()
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return folder


def write_drafter(folder: Path, target: HFTarget) -> Path:
    torch.manual_seed(1)
    vocab = VocabMap.identity(target.spec.vocab_size)
    head = Eagle3(eagle3_options(target.model.config, target.spec, vocab.size), vocab, target.embedding)
    with artefacts.writing(folder, checkpoint.KIND, checkpoint.identity(head, target.spec.fingerprint)) as scratch:
        checkpoint.write(head, scratch)
    return folder


def test_importing_draftsmith_is_quick() -> None:
    code = (
        "import sys, draftsmith; assert not {'torch', 'transformers', 'pydantic'} & sys.modules.keys(); "
        "draftsmith.load; assert 'torch' in sys.modules"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(draftsmith.__file__).parents[1], check=False).returncode
        == 0
    )
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = draftsmith.lod


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_is_the_targets_own(drafting: Model, temperature: float) -> None:
    target = talking_target()
    ids = chat.prompt_ids(target.tokenizer, MESSAGES)
    plain = Engine(target).generate([ids], Sampling(temperature=temperature, seed=3), NEW)[0]
    found = drafting.generate(MESSAGES, max_new_tokens=NEW, temperature=temperature, seed=3)
    assert found.token_ids == plain.token_ids
    assert found.prompt_ids == ids
    assert found.finish == plain.finish
    assert found.text == target.tokenizer.decode(found.token_ids, skip_special_tokens=True)
    rounds = found.generation.rounds
    assert found.acceptance_length == sum(r.committed for r in rounds) / len(rounds)
    assert found.tokens_per_second == pytest.approx(len(found.token_ids) / found.generation.total_ms * 1e3)
    assert temperature or found.acceptance_length > 2


def test_greedy_answers_equal_transformers(drafting: Model) -> None:
    ids = torch.tensor([chat.prompt_ids(drafting.target.tokenizer, MESSAGES)])
    theirs = drafting.target.model.generate(
        ids, do_sample=False, max_new_tokens=NEW, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    assert drafting.generate(MESSAGES, max_new_tokens=NEW).token_ids == theirs[0, ids.shape[1] :].tolist()


def test_every_form_of_a_prompt(drafting: Model) -> None:
    ids = chat.prompt_ids(drafting.target.tokenizer, MESSAGES)
    expected = drafting.generate(MESSAGES, max_new_tokens=NEW).token_ids
    assert drafting.generate("How are you?", max_new_tokens=NEW).token_ids == expected
    assert drafting.generate(ids, max_new_tokens=NEW).token_ids == expected
    assert drafting.generate((Message("user", "How are you?"),), max_new_tokens=NEW).token_ids == expected
    several = [
        drafting.generate([MESSAGES, [{"role": "user", "content": "Hi"}]], max_new_tokens=NEW),
        drafting.generate(["How are you?", "Hi"], max_new_tokens=NEW),
        drafting.generate([ids, chat.prompt_ids(drafting.target.tokenizer, ASKED[2].messages)], max_new_tokens=NEW),
    ]
    alone = drafting.generate("Hi", max_new_tokens=NEW).token_ids
    assert [[a.token_ids for a in found] for found in several] == [[expected, alone]] * 3
    assert [a.token_ids for a in drafting.generate([MESSAGES], max_new_tokens=NEW)] == [expected]


def test_a_stream_gives_the_answer_in_pieces(drafting: Model) -> None:
    whole = drafting.generate(["How are you?", "Count: 🙂 é"], max_new_tokens=NEW)
    stream = drafting.generate(["How are you?", "Count: 🙂 é"], stream=True, max_new_tokens=NEW)
    assert isinstance(stream, Stream)
    pieces = list(stream)
    assert any(len(piece.token_ids) > 2 for piece in pieces)
    for b, answer in enumerate(whole):
        own = [piece for piece in pieces if piece.request == b]
        assert "".join(piece.text for piece in own) == answer.text == stream.answers[b].text
        assert [token for piece in own for token in piece.token_ids] == answer.token_ids == stream.answers[b].token_ids
        assert len(own) == 1 + len(answer.generation.rounds)
        for piece, r in zip(own[1:], answer.generation.rounds, strict=True):
            assert len(piece.texts) == len(piece.token_ids) == len(piece.owners) == len(piece.depths) == r.kept
            assert piece.owners == [*r.owners, -1][: r.kept]
            assert piece.depths == [*range(1, r.accepted + 1), 0][: r.kept]
        assert (own[0].owners, own[0].depths) == ([-1], [0])
    assert stream.answer == stream.answers[0]


class Script:
    """Stands in for the engine: writes given pieces."""

    def __init__(self, target: HFTarget, pieces: list[list[int]]) -> None:
        self.target, self.pieces = target, pieces

    def stream(self, prompts: Any, sampling: Any, most: int) -> Any:
        from draftsmith.decoding.engine import Piece
        from draftsmith.decoding.trace import Generation

        for ids in self.pieces:
            yield Piece(0, ids, [-1] * len(ids), [0] * len(ids))
        yield Generation(0, [i for ids in self.pieces for i in ids], "stop")


@pytest.mark.parametrize("end", ["limit", "end token"])
def test_characters_split_over_pieces_come_out_whole_and_cut_ones_at_the_end(end: str) -> None:
    target = talking_target()
    bytes_ = target.tokenizer("🙂é", add_special_tokens=False)["input_ids"]
    assert len(bytes_) == 6
    last = [bytes_[0]] + ([target.tokenizer.eos_token_id] if end == "end token" else [])
    script = Script(target, [bytes_[:1], bytes_[1:3], bytes_[3:5], [bytes_[5], *last]])
    total = sum(map(len, script.pieces))
    stream = Stream(script, [[1]], target.tokenizer, Sampling(), total)  # type: ignore[arg-type]
    assert [piece.texts for piece in stream] == [
        [""],
        ["", ""],
        ["🙂", ""],
        ["é", "\ufffd"] if end == "limit" else ["é", "", "\ufffd"],
    ]
    assert (
        stream.answer.text == "🙂é\ufffd" == target.tokenizer.decode(stream.answer.token_ids, skip_special_tokens=True)
    )


def test_a_closed_stream_ends_and_the_model_goes_on(drafting: Model) -> None:
    stream = drafting.generate(MESSAGES, stream=True, max_new_tokens=NEW)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.answers == {}
    assert (
        drafting.generate(MESSAGES, max_new_tokens=NEW).token_ids
        == drafting.generate(MESSAGES, max_new_tokens=NEW).token_ids
    )


def test_plain_decoding_and_seeds() -> None:
    model = load(talking_target())
    assert model.composition is None
    texts = [tuple(model.generate("Hi", max_new_tokens=NEW, temperature=1.0, seed=s).token_ids) for s in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert model.generate("Hi", max_new_tokens=NEW).acceptance_length == 1.0
    assert math.isnan(model.generate("Hi", max_new_tokens=1).acceptance_length)
    # further options reach the sampling
    greedy = model.generate("Hi", max_new_tokens=NEW).token_ids
    assert model.generate("Hi", max_new_tokens=NEW, temperature=1.0, top_k=1).token_ids == greedy
    assert greedy[0] not in model.generate("Hi", max_new_tokens=NEW, suppress_tokens=(greedy[0],)).token_ids


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([], {}, "there is no prompt"),
        ("", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("Hi", {"top_q": 0.5}, "top_q is no option; did you mean top_"),
        ("Hi", {"temperature": -1}, "temperature"),
        ([[]], {}, "prompt 0 is empty"),
        ([1] * 300, {}, "300 tokens"),
    ],
)
def test_wrong_calls_say_what_is_wrong(prompt: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Model(talking_target()).generate(prompt, **options)


def test_messages_need_a_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    target = talking_target()
    monkeypatch.setattr(target.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        Model(target).generate("Hi")
    assert Model(target).generate([5, 6], max_new_tokens=2).token_ids  # ids need none


def test_a_drafter_and_a_run_are_loaded(tmp_path: Path, model_folder: Path) -> None:
    target = talking_target()
    run = tmp_path / "run"
    folder = write_drafter(run / "drafter", target)
    model = load(target, folder)
    assert isinstance(model.composition, Single)
    assert model.composition.growth == GrowthOptions().build()
    plain = load(target).generate("Hi", max_new_tokens=NEW)
    assert model.generate("Hi", max_new_tokens=NEW).token_ids == plain.token_ids
    # a run's own growth, wherever the run keeps it, unless another is asked for
    artefacts.write_json(run / "growth.json", {"kind": "chain", "depth": 2})
    assert load(target, run).composition.growth == ChainGrowth(2)  # type: ignore[union-attr]
    artefacts.write_json(run / "growth" / "growth.json", {"kind": "dynamic", "node_budget": 5, "depth": 2, "width": 3})
    assert load(target, run).composition.growth == DynamicGrowth(5, 2, 3)  # type: ignore[union-attr]
    assert load(target, run, GrowthOptions(kind="chain", depth=1)).composition.growth == ChainGrowth(1)  # type: ignore[union-attr]
    assert load(target, run, ChainGrowth(3)).composition.growth == ChainGrowth(3)  # type: ignore[union-attr]
    # the run knows its target
    with pytest.raises(UserError, match="name the target"):
        load(drafters=run)
    (run / "recipe.yaml").write_text(
        yaml.safe_dump({"target": {"name": str(model_folder), "dtype": "float32"}}), "utf-8"
    )
    assert run_target(run) == (str(model_folder), "float32", "auto")
    loaded = load(drafters=run)
    assert loaded.target.spec.fingerprint == target.spec.fingerprint
    assert loaded.generate("Hi", max_new_tokens=NEW).token_ids == plain.token_ids


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    target = talking_target()
    with pytest.raises(UserError, match="name a target"):
        load()
    with pytest.raises(UserError, match="nowhere does not exist"):
        load(target, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is no artefact"):
        load(target, tmp_path / "empty")
    folder = write_drafter(tmp_path / "drafter", target)
    manifest = artefacts.read_json(folder / "manifest.json")
    manifest["meta"]["target"] = "another"
    artefacts.write_json(folder / "manifest.json", manifest)
    with pytest.raises(StaleError, match='target is "another"'):
        load(target, folder)
    (tmp_path / "recipe.yaml").write_text("target: {dtype: float32}\n", "utf-8")
    with pytest.raises(UserError, match="recipe.yaml: target.name is missing"):
        run_target(tmp_path)
    (tmp_path / "recipe.yaml").write_text("target: smollm2\n", "utf-8")
    assert run_target(tmp_path) == ("smollm2", "auto", "auto")
    assert run_growth(tmp_path) == GrowthOptions()
