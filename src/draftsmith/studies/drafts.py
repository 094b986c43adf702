"""Drafts for the cells of the AdaSPEC study: methods as options of a training, and what each training cost.

Costs are multiply-adds of the matrix products with weights, the same on every machine, so that "as much as AdaSPEC
takes" is a number of steps that follows from the options. Attention's own products, norms and the optimiser are left
out, for every method alike; seconds stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.head import Head
from draftsmith.drafters.standalone import Standalone
from draftsmith.drafters.truncation import kept_layers, made
from draftsmith.foundation import artefacts, options
from draftsmith.recipe import DrafterOptions
from draftsmith.studies import heads
from draftsmith.studies.corpus import Corpus
from draftsmith.studies.grid import claimed
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training import algorithms, reference
from draftsmith.training.account import Account
from draftsmith.training.algorithms import Kind, Trained
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.base import Objective, SampleSource
from draftsmith.training.objectives.eagle import EagleLossOptions
from draftsmith.training.objectives.hass import HassLossOptions
from draftsmith.training.on_policy import OnPolicySource
from draftsmith.training.options import OnPolicyOptions, TrainOptions
from draftsmith.training.reference import WithReference
from draftsmith.training.trainer import train

PLAIN_LOSS = "forward-kl"
CHECKPOINT_AFTER = 1 / 3  # of the training
MIXED = 0.5  # share of texts that the draft writes


@dataclass(frozen=True)
class Method:
    """How a draft is trained; what is not said is DistillSpec: forward KL on all answer tokens.

    Attributes:
        reference: what ΔL compares with: a draft "trained" first, the "ema" of this training's own weights, or the
            "checkpoint" after a third of it, from which it goes on.
        weights: options of the token weights, without k and scope.
        loss: the divergence that is trained; rows are always chosen by the forward KL.
        ema: whether the averaged weights are kept.
        mixed: whether the draft writes some of the texts itself.
    """

    reference: Literal["trained", "ema", "checkpoint"] | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    loss: str | None = None
    ema: bool = False
    mixed: bool = False

    @property
    def keeps_share(self) -> bool:
        """Whether it keeps a fixed share k of the tokens at the end."""
        return self.reference is not None and self.weights.get("keep", "share") != "positive"


METHODS: Mapping[str, Method] = {
    "distillspec": Method(),
    "distillspec-ema": Method(ema=True),
    "distillspec-mixed": Method(mixed=True),
    "overlap": Method(loss="lk"),
    "survival": Method(weights={"name": "prefix-survival"}),
    "adaspec": Method("trained"),
    "adaspec-least": Method("trained", {"keep": "least"}),
    "adaspec-positive": Method("trained", {"keep": "positive"}),
    "adaspec-anneal": Method("trained", {"anneal": 0.5}),
    "adaspec-overlap": Method("trained", loss="lk"),
    "adaspec-survival": Method("trained", {"survival": True}),
    "adaspec-ema": Method("ema", ema=True),
    "adaspec-checkpoint": Method("checkpoint"),
}


def canonical(method: str, accounting: str, loss: str = PLAIN_LOSS) -> str:
    """The accounting under which a method's training already stands.

    At equal tokens what keeps all tokens trains as at equal epochs. At equal cost AdaSPEC does, whose cost it is, and
    so does whatever else has a trained reference and nothing more to reckon.
    """
    found = METHODS[method]
    no_more = loss == PLAIN_LOSS and found.loss is None and "survival" not in found.weights
    if accounting == "equal-tokens" and not found.keeps_share:
        return "equal-epochs"
    if accounting == "equal-cost" and found.reference == "trained" and no_more:
        return "equal-epochs"
    return accounting


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a position.

    Attributes:
        trained: read, judged by the loss and gone back through; read: by a draft that is only asked for losses.
        look: another loss of the same states; written: by the draft; target: read by the target, scores included.
    """

    trained: float
    read: float
    look: float
    written: float
    target: float


@dataclass(frozen=True)
class Spent:
    """What a cell's training took: the draft's, its reference's and the target's passes and tokens.

    Attributes:
        steps: optimiser steps of the draft; seconds: of all trainings, wall-clock.
        passes, tokens: of the draft's training.
        reference_passes, reference_tokens: of the training of its reference.
        judged_passes, judged_tokens: of a reference that is asked for losses.
        written_tokens: by the draft itself; target_texts, target_tokens: read by the target.
        looks: other losses of the same states, for each trained token.
    """

    steps: int
    seconds: float
    passes: int
    tokens: int
    reference_passes: int = 0
    reference_tokens: int = 0
    judged_passes: int = 0
    judged_tokens: int = 0
    written_tokens: int = 0
    target_texts: int = 0
    target_tokens: int = 0
    looks: int = 0

    def training(self, work: Work) -> float:
        """Multiply-adds of all but the target's reading."""
        return (
            work.trained * (self.tokens + self.reference_tokens)
            + work.look * self.looks * self.tokens
            + work.read * self.judged_tokens
            + work.written * self.written_tokens
        )

    def all(self, work: Work) -> float:
        """Multiply-adds of everything."""
        return self.training(work) + work.target * self.target_tokens


@dataclass(frozen=True)
class Lesson:
    """One training.

    Attributes:
        loss: the divergence, unless the method has its own; fraction: k, of methods that keep a share.
        steps: of the draft; None: as many as the study's epochs are.
    """

    method: str
    domain: str
    kind: Kind
    loss: str
    fraction: float
    seed: int
    steps: int | None = None


class School:
    """Trains the drafts of a study. `shared` gets what several cells need: references, their losses, chosen layers."""

    def __init__(
        self, corpus: Corpus, vocab: VocabMap, drafter: DrafterOptions, o: TrainOptions, chain: int, shared: Path
    ) -> None:
        self.corpus, self.vocab, self.options, self.chain, self.shared = corpus, vocab, o, chain, shared
        self._drafter = drafter

    @cached_property
    def drafter(self) -> DrafterOptions:
        """The drafter's options with the layers to keep by their numbers: chosen once, on some training texts."""
        o = self._drafter.standalone
        if o.folder is not None or not isinstance(o.keep_layers, int):
            return self._drafter
        identity = {"options": o.model_dump(mode="json"), "inputs": self.corpus.identity}
        place = self.shared / f"layers-{options.digest(identity)[:8]}.json"
        if not place.is_file():
            names = self.corpus.train_ids
            texts = [self.corpus.training[i] for i in names[:: max(1, len(names) // o.texts)]]
            layers = kept_layers(self.corpus.target, o, [(text.ids, text.answer_rows) for text in texts])
            artefacts.write_json(place, list(layers))
        chosen = o.model_copy(update={"keep_layers": tuple(artefacts.read_json(place))})
        return self._drafter.model_copy(update={"standalone": chosen})

    def fresh(self, kind: Kind, seed: int) -> Trained:
        """An untrained draft: the same target's layers for every seed, or a head of the seed's own weights."""
        if kind == "standalone":
            return made(self.corpus.target, self.vocab, self.drafter.standalone, [])
        return heads.fresh_head(self.corpus, self.vocab, seed)

    def objective(self, kind: Kind, draft: Trained, o: TrainOptions) -> Objective:
        """What trains it, or judges with it."""
        return algorithms.objective(
            kind, draft, self.corpus.target, o, EagleLossOptions(), HassLossOptions(), self.chain
        )

    def work(self, kind: Kind, domain: str) -> Work:
        """What a position of a domain's training texts costs."""
        draft, target = self.fresh(kind, 0), self.corpus.target
        output = self.vocab.size * target.spec.hidden_size
        steps = 1 if kind == "standalone" else self.options.unroll_steps
        if isinstance(draft, Standalone):
            body = sum(p.numel() for p in draft.model.base_model.layers.parameters())
            trains_output = draft.model.get_output_embeddings().weight.requires_grad
        else:
            body = sum(p.numel() for p in draft.parameters() if p.requires_grad) - output
            trains_output = True
        names = self.corpus.groups[domain]
        store = self.corpus.training
        rows = sum(int(store[i].answer_rows.sum()) for i in names) / self.positions(domain)
        # a loss: the draft's logits and the teacher's; back: through its logits to the states, and to the weights
        loss, back = 2 * output * rows, (2 if trains_output else 1) * output * rows
        model = target.model
        reading = sum(p.numel() for p in model.base_model.layers.parameters())
        reading += target.spec.vocab_size * target.spec.hidden_size
        return Work(steps * (3 * body + loss + back), steps * (body + loss), steps * loss, body + output, reading)

    def positions(self, domain: str) -> int:
        """Tokens of a domain's training texts, prompts included."""
        store = self.corpus.training
        known = dict(zip(store.ids, store.lengths, strict=True))
        return sum(known[i] for i in self.corpus.groups[domain])

    def epochs_steps(self, domain: str, seed: int) -> int:
        """Steps of as many epochs as the study's options say."""
        o = self.options.model_copy(update={"seed": seed})
        return heads.steps_of(self.corpus, self.corpus.groups[domain], o)

    def steps_at_equal_cost(self, lesson: Lesson) -> int:
        """Steps after which a method has taken what AdaSPEC takes: a reference, its losses, and as long a training."""
        work, whole, epochs = self.work(lesson.kind, lesson.domain), self.positions(lesson.domain), self.epochs
        budget = whole * (2 * epochs * work.trained + work.read)
        method = METHODS[lesson.method]
        first, each = 0.0, work.trained + self.looks(lesson) * work.look
        if method.reference == "trained":
            first = whole * (epochs * work.trained + work.read)
        elif method.reference == "checkpoint":
            first = whole * work.read
        elif method.reference == "ema":
            each += work.read
        steps = self.epochs_steps(lesson.domain, lesson.seed)
        return max(1, round((budget - first) / (whole * each) * steps / epochs))

    @property
    def epochs(self) -> int:
        """Of equal epochs."""
        assert self.options.epochs is not None
        return self.options.epochs

    def looks(self, lesson: Lesson) -> int:
        """Losses of the same states beside the trained one: what judges, and how likely a row is reached."""
        o = self.train_options(lesson)
        return int(o.judge is not None) + int("survival" in o.weights.build().needs)

    def train_options(self, lesson: Lesson) -> TrainOptions:
        """The options of a lesson's training."""
        method, o = METHODS[lesson.method], self.options
        loss = method.loss or lesson.loss
        weights = {"name": "uniform"} if method.reference is None else dict(o.weights.model_dump(exclude_none=True))
        weights |= {"name": "delta-loss"} if method.reference is not None else {}
        weights |= {"fraction": lesson.fraction} if method.keeps_share else {}
        update: dict[str, Any] = {
            "seed": lesson.seed,
            "loss": loss,
            "judge": PLAIN_LOSS if method.reference is not None and loss != PLAIN_LOSS else None,
            "weights": o.weights.model_validate({**weights, **method.weights}),
            "ema": o.ema if method.ema else 0.0,
            "reference": "ema" if method.reference == "ema" else None,
            "on_policy": o.on_policy.model_copy(update={"share": MIXED}) if method.mixed else OnPolicyOptions(),
        }
        if lesson.steps is not None:
            update |= {"steps": lesson.steps, "epochs": None}
        return o.model_copy(update=update)

    def taught(self, lesson: Lesson, dev: Dev, folder: Path) -> tuple[Trained, Spent]:
        """Train a draft, or go on with it; in the target's number format, with what it took."""
        o, method = self.train_options(lesson), METHODS[lesson.method]
        ids, source = self.corpus.groups[lesson.domain], self.corpus.training
        plainly = Lesson("distillspec", lesson.domain, lesson.kind, PLAIN_LOSS, 1.0, lesson.seed)
        if lesson == plainly:
            place, _, _ = self.reference(plainly, dev)
            return self.load(place), self._spent(lesson, [place], self.epochs_steps(lesson.domain, lesson.seed))
        start, steps = self.fresh(lesson.kind, lesson.seed), o.steps or self.epochs_steps(lesson.domain, lesson.seed)
        read: SampleSource = source
        before: list[Path] = []
        if method.reference == "trained":
            _, read, before = self.reference(plainly, dev)
        elif method.reference == "checkpoint":
            early = max(1, round(steps * CHECKPOINT_AFTER))
            place, read, before = self.reference(replace(plainly, steps=early), dev, folder)
            start.load_state_dict(self.load(place, torch.float32).state_dict())
            o = o.model_copy(update={"steps": max(1, steps - early), "epochs": None})
        account = Account()
        if method.mixed:
            assert isinstance(start, Standalone)
            passes = self.corpus.options.features
            read = OnPolicySource(read, start, self.corpus.target, o.on_policy, passes, lesson.seed, account)
        place = folder / "drafter"
        if not (place / artefacts.MANIFEST).is_file():
            objective, meta = self.objective(lesson.kind, start, o), self._identity(lesson)
            train(start, objective, read, ids, dev, o, place, folder / heads.LOG, meta, account=account)
        return self.load(place), self._spent(lesson, [place, *before], steps)

    def reference(self, lesson: Lesson, dev: Dev, folder: Path | None = None) -> tuple[Path, WithReference, list[Path]]:
        """A draft that is trained plainly, the training texts with its losses, and the artefacts that this took.

        Without a folder it is shared: one command makes it, others that run beside it wait.
        """
        identity = self._identity(lesson)
        if folder is None:
            name = f"reference-{lesson.domain}-seed{lesson.seed}-{options.digest(identity)[:8]}"
            with claimed(self.shared.parent / "locks" / name, wait=True):
                return self.reference(lesson, dev, self.shared / name)
        source, _ = reference.trained(
            fresh=lambda: self.fresh(lesson.kind, lesson.seed),
            load=lambda place: self.load(place, torch.float32),
            objective_of=lambda draft, given: self.objective(lesson.kind, draft, given),
            source=self.corpus.training,
            kept=self.corpus.groups[lesson.domain],
            dev=dev,
            options=self.train_options(lesson),
            folder=folder,
            meta=identity,
        )
        return folder / "reference", source, [folder / "reference", folder / "reference-losses"]

    def load(self, place: Path, dtype: torch.dtype | None = None) -> Trained:
        """A trained draft."""
        found = load_drafter(place, self.corpus.target, dtype, checksums=False)
        assert isinstance(found, Head | Standalone)
        return found

    def _identity(self, lesson: Lesson) -> dict[str, object]:
        return {
            "lesson": [lesson.domain, lesson.kind, lesson.seed],
            "draft": self.drafter.model_dump(mode="json"),
            "options": self.train_options(lesson).model_dump(mode="json"),
            "inputs": self.corpus.identity,
        }

    def _spent(self, lesson: Lesson, made_by: list[Path], steps: int) -> Spent:
        """From the accounts of trainings (their first is the draft's own) and of stored losses."""
        own, *before = (artefacts.read_json(_costs(place)) for place in made_by)
        own = own.get("cost", own)
        first, losses = (before[0].get("cost", {}), before[1]) if before else ({}, {})
        early = METHODS[lesson.method].reference == "checkpoint"  # then it is the draft's own beginning
        trained, at_first = _count(own, "draft", "trained"), _count(first, "draft", "trained")
        judged, stored = _count(own, "reference", "judged"), _count(losses, "reference", "judged")
        seconds = sum(float(artefacts.read_json(place / artefacts.MEASURED)["seconds"]) for place in made_by)
        texts = len(self.corpus.groups[lesson.domain])
        return Spent(
            steps=steps,
            seconds=round(seconds, 3),
            passes=trained[0] + (at_first[0] if early else 0),
            tokens=trained[1] + (at_first[1] if early else 0),
            reference_passes=0 if early else at_first[0],
            reference_tokens=0 if early else at_first[1],
            judged_passes=judged[0] + stored[0],
            judged_tokens=judged[1] + stored[1],
            written_tokens=_count(own, "draft", "written")[1],
            target_texts=texts,
            target_tokens=self.positions(lesson.domain) + _count(own, "target", "read")[1],
            looks=self.looks(lesson),
        )


def _costs(place: Path) -> Path:
    training = place / "training.json"
    return training if training.is_file() else place / "cost.json"


def _count(costs: Mapping[str, Any], who: str, what: str) -> tuple[int, int]:
    """(passes, tokens) of an account."""
    found = costs.get(who, {}).get(what, {})
    return int(found.get("passes", 0)), int(found.get("tokens", 0))
