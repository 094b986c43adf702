"""What a study's cells share: prompts by domain, the target's answers to them, and their features.

Training and dev prompts come from files, test prompts from benchmarks; the target writes every answer once, the test
answers at each temperature. One folder for each step, named by what it is made from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from draftsmith.data import benchmarks, regenerate
from draftsmith.data import features as feature_store
from draftsmith.data.conversations import Conversation, Message, from_row, read_conversations, to_row
from draftsmith.data.features import FeatureStore, PassOptions
from draftsmith.data.regenerate import RegenerateOptions
from draftsmith.data.samples import samples_of
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation import artefacts, options, seeding
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import StoredAnswer
from draftsmith.target.sampling import Sampling
from draftsmith.training.batches import counted_starts

WRAPS = {"as-is": benchmarks.as_is, "final-number": benchmarks.final_number, "function-only": benchmarks.function_only}
SPLITS = ("train", "dev", "test")


class DomainOptions(Options):
    """Where a domain's prompts come from."""

    train: tuple[str, ...] = Field(
        min_length=1, description="files in the data folder, paths or hub data sets; what is asked first in each row"
    )
    wrap: Literal["as-is", "final-number", "function-only"] = Field(
        default="as-is", description="what is put around a training prompt, as around the benchmark's"
    )
    test: str = Field(description="benchmark, by the name that `bench` knows, or a file")
    more_tests: tuple[str, ...] = Field(default=(), description="further benchmarks, of as many test answers each")

    @property
    def tests(self) -> tuple[str, ...]:
        return self.test, *self.more_tests

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # what was made before there were further benchmarks keeps its fingerprint
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value or name != "more_tests"}


DOMAINS = {
    "math": DomainOptions(train=("train_math_gsm8k.jsonl",), wrap="final-number", test="gsm8k"),
    "chat": DomainOptions(train=("train_chat_oasst_prompts.jsonl", "train_chat_dolly_openqa.jsonl"), test="mt-bench"),
    "code": DomainOptions(train=("train_code_gpteacher_codegen.jsonl", "train_code_mbpp.jsonl"), test="humaneval"),
}


class CorpusOptions(Options):
    """Prompts and answers of a study."""

    domains: dict[str, DomainOptions] = Field(default=DOMAINS, min_length=1)
    train: int = Field(default=200, ge=1, description="training prompts of each domain")
    dev: int = Field(default=8, ge=1, description="dev prompts of each domain")
    test: int = Field(default=30, ge=1, description="test answers of each domain; a second turn is another answer")
    longest_prompt: int = Field(default=600, ge=1, description="characters of a training or dev prompt at most")
    train_tokens: int = Field(default=112, ge=2, description="tokens of a training or dev answer at most")
    test_tokens: int = Field(default=128, ge=2, description="tokens of a test answer at most")
    temperature: float = Field(default=0.0, ge=0, description="of training and dev answers")
    temperatures: tuple[float, ...] = Field(default=(0.0, 1.0), min_length=1, description="of test answers")
    batch: int = Field(default=64, ge=1, description="prompts answered together")
    features: PassOptions = PassOptions()
    seed: int = Field(default=0, description="of the choice of prompts and of sampled answers")


@dataclass(frozen=True)
class AnswerSet:
    """Stored answers of one benchmark at one temperature."""

    domain: str
    benchmark: str
    temperature: float
    ids: Sequence[str]
    answers: Sequence[StoredAnswer]


class Corpus:
    """A study's data, made step by step under `folder`; every step goes on after a kill."""

    def __init__(self, target: HFTarget, layers: Sequence[int], o: CorpusOptions, folder: Path) -> None:
        self.target, self.options, self.folder = target, o, folder
        self.want = FeatureSpec(tuple(layers), True)

    def prepare(self) -> None:
        """Bring everything to done."""
        _ = self.prompts, self.training
        for temperature in self.options.temperatures:
            self.test_store(temperature)

    @cached_property
    def identity(self) -> dict[str, object]:
        """Checksums of all that cells read."""
        tests = {str(t): artefacts.checksum(self.test_store(t).folder) for t in self.options.temperatures}
        return {"training": artefacts.checksum(self.training.folder), "tests": tests}

    @cached_property
    def prompts(self) -> dict[str, dict[str, list[Conversation]]]:
        """Prompts by split and domain."""
        found: dict[str, dict[str, list[Conversation]]] = {}
        for split in SPLITS:
            by_domain = found.setdefault(split, {name: [] for name in self.options.domains})
            for row in artefacts.read_jsonl(self._prompts / f"{split}.jsonl"):
                by_domain[str(row["domain"])].append(from_row(row))
        return found

    @cached_property
    def test_sets(self) -> dict[tuple[str, str], list[Conversation]]:
        """Test prompts by domain and benchmark."""
        found: dict[tuple[str, str], list[Conversation]] = {}
        for row in artefacts.read_jsonl(self._prompts / "test.jsonl"):
            domain = str(row["domain"])
            place = domain, str(row.get("benchmark", self.options.domains[domain].test))
            found.setdefault(place, []).append(from_row(row))
        return found

    @cached_property
    def _prompts(self) -> Path:
        o = self.options
        identity = o.model_dump(mode="json", include={"domains", "train", "dev", "test", "longest_prompt", "seed"})
        place = self._place("prompts", identity)
        if not _made(place):
            with artefacts.writing(place, "prompts", identity) as scratch:
                rows: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
                for name, domain in o.domains.items():
                    asked = _asked(domain, name, o.train + o.dev, o.longest_prompt, o.seed)
                    for split, found in zip(SPLITS, (asked[: o.train], asked[o.train :]), strict=False):
                        rows[split] += [{**to_row(c), "domain": name} for c in found]
                    for test in domain.tests:
                        more = {"benchmark": test} if test != domain.test else {}
                        rows["test"] += [{**to_row(c), "domain": name, **more} for c in _tested(test, o.test, o.seed)]
                for split, asked_rows in rows.items():
                    artefacts.write_jsonl(scratch / f"{split}.jsonl", asked_rows)
        return place

    @cached_property
    def training(self) -> FeatureStore:
        """Features of training and dev answers."""
        asked = [c for split in ("train", "dev") for part in self.prompts[split].values() for c in part]
        return self._stored("training", asked, self.options.temperature, self.options.train_tokens)

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Training samples that teach something, by domain, in a keyed order."""
        found: dict[str, list[str]] = {}
        for name, part in self.prompts["train"].items():
            ids = _known(self.training, part)
            teaching = [i for i in ids if bool(counted_starts(self.training[i].mask, 1).any())]
            found[name] = [teaching[i] for i in seeding.shuffled(len(teaching), "corpus", self.options.seed, name)]
        return found

    @property
    def train_ids(self) -> list[str]:
        """All training samples that teach something."""
        return [i for part in self.groups.values() for i in part]

    @cached_property
    def dev(self) -> list[StoredAnswer]:
        """Dev answers."""
        ids = [i for part in self.prompts["dev"].values() for i in _known(self.training, part)]
        return [stored_answer(self.training[i]) for i in ids]

    @cached_property
    def tests(self) -> list[AnswerSet]:
        """Test answers of every benchmark at every temperature."""
        found = []
        for temperature in self.options.temperatures:
            store = self.test_store(temperature)
            for (domain, benchmark), part in self.test_sets.items():
                ids = _known(store, part)
                answers = [stored_answer(store[i]) for i in ids]
                found.append(AnswerSet(domain, benchmark, temperature, ids, answers))
        return found

    def test_store(self, temperature: float) -> FeatureStore:
        """Features of the test answers at a temperature."""
        if temperature not in self._test_stores:
            asked = [c for part in self.prompts["test"].values() for c in part]
            name = f"test-{temperature:g}"
            self._test_stores[temperature] = self._stored(name, asked, temperature, self.options.test_tokens)
        return self._test_stores[temperature]

    @cached_property
    def _test_stores(self) -> dict[float, FeatureStore]:
        return {}

    def _stored(self, name: str, asked: Sequence[Conversation], temperature: float, tokens: int) -> FeatureStore:
        """Answers to prompts and their features."""
        o = self.options
        sampling = Sampling(temperature=temperature, seed=o.seed)
        writing = RegenerateOptions(max_new_tokens=tokens, batch=o.batch, sampling=sampling)
        meta: dict[str, object] = {"prompts": artefacts.checksum(self._prompts), "split": name}
        made_by = {**meta, "target": self.target.spec.fingerprint, "regenerate": writing.model_dump(mode="json")}
        answers = self._place(f"{name}-answers", made_by)
        if not _made(answers):
            regenerate.regenerate(self.target, asked, writing, answers, meta)
        inputs: dict[str, object] = {"answers": artefacts.checksum(answers)}
        layers = [str(layer) for layer in self.want.names]
        place = self._place(
            f"{name}-features", {**inputs, "layers": layers, "pass": o.features.model_dump(mode="json")}
        )
        if not _made(place):
            longest = self.target.spec.max_positions
            samples = [s for c in regenerate.read(answers) for s in samples_of(c, self.target.tokenizer)]
            train = {c.id for part in self.prompts["train"].values() for c in part}
            feature_store.store(
                self.target,
                [s for s in samples if len(s.ids) <= longest],
                self.want,
                o.features,
                place,
                inputs,
                train.__contains__,
            )
        return FeatureStore(place, {"target": self.target.spec.fingerprint}, checksums=False)

    def _place(self, name: str, identity: dict[str, object]) -> Path:
        return self.folder / f"{name}-{options.digest(identity)[:8]}"


def _made(place: Path) -> bool:
    return (place / artefacts.MANIFEST).is_file()


def _known(store: FeatureStore, asked: Sequence[Conversation]) -> list[str]:
    """The store's samples of some prompts, in their order; each user turn is a sample of its own."""
    there = set(store.ids)
    names = [job.id for c in asked for turn in range(regenerate.turns(c)) for job in regenerate.plan([c], turn)]
    return [name for name in names if name in there]


def _asked(domain: DomainOptions, name: str, count: int, longest: int, seed: int) -> list[Conversation]:
    """`count` prompts of a domain, its files taking turns, each in a keyed order."""
    wrap = WRAPS[domain.wrap]
    queues = []
    for file in domain.train:
        found, _ = read_conversations(_located(file), max_chars=10**7)
        asked = []
        for c in found:
            first = next(m.content for m in c.messages if m.role == "user")
            if len(first) <= longest:
                asked.append(Conversation(c.id, (Message("user", wrap(first)),), source=name))
        queues.append([asked[i] for i in seeding.shuffled(len(asked), "study prompts", seed, file)])
    mixed = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    if len(mixed) < count:
        raise UserError(
            f"the domain {name} has {len(mixed)} prompts of at most {longest} characters, and {count} are wanted for "
            "training and dev: lower corpus.train, or raise corpus.longest_prompt"
        )
    return mixed[:count]


def _located(file: str) -> str:
    folder = os.environ.get(benchmarks.VARIABLE)
    inside = Path(folder, file) if folder else None
    if inside is not None and inside.is_file():
        return str(inside)
    if Path(file).suffix and not Path(file).is_file():
        where = f"is not in {folder}" if folder else f"needs a folder: give --data, or set {benchmarks.VARIABLE}"
        raise UserError(f"the study's prompts {file}: that file {where}")
    return file


def _tested(benchmark: str, count: int, seed: int) -> list[Conversation]:
    """Test prompts of a benchmark that ask for `count` answers together."""
    taken: list[Conversation] = []
    left = count
    for conversation in benchmarks.load_benchmark(benchmark, count, seed):
        if regenerate.turns(conversation) <= left:
            left -= regenerate.turns(conversation)
            taken.append(replace(conversation, answer=None))
    return taken
