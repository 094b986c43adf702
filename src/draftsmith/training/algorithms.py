"""The drafters that a recipe can ask for: what each reads, how it begins, and the objective that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle import Eagle, eagle_options
from draftsmith.drafters.eagle3 import Eagle3, Eagle3Options, auxiliary_layers, eagle3_options
from draftsmith.drafters.head import Head
from draftsmith.drafters.standalone import Standalone
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.numerics import losses
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, TargetSpec
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.objectives.base import Objective
from draftsmith.training.objectives.distillation import DistillationObjective
from draftsmith.training.objectives.eagle import EagleLossOptions, EagleObjective
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.objectives.hass import HassLossOptions, HassObjective
from draftsmith.training.options import TrainOptions

Kind = Literal["eagle3", "eagle", "hass", "standalone"]
TITLES: dict[Kind, str] = {
    "eagle3": "EAGLE-3",
    "eagle": "EAGLE-2",
    "hass": "HASS",
    "standalone": "standalone draft",
}
Trained = Head | Standalone
Norm = Literal["norm_output", "fc_norm", "norm_before_fc", "norm_before_residual"]


def reads(kind: Kind, layers: tuple[int, ...] | None, spec: TargetSpec) -> FeatureSpec:
    """The target's states that training takes, the teacher's among them.

    Raises:
        ValueError: as `auxiliary_layers`.
    """
    return FeatureSpec(auxiliary_layers(layers, spec.layers) if kind == "eagle3" else (), final=True)


def blank_head(
    kind: Kind,
    config: Any,
    spec: TargetSpec,
    draft_vocab_size: int,
    layers: tuple[int, ...] | None,
    norms: Sequence[Norm] = (),
) -> Eagle3 | Eagle:
    """A head without values: its parameters have their shapes and take no memory.

    Raises:
        ValueError: as `auxiliary_layers`.
    """
    vocab = VocabMap(torch.arange(draft_vocab_size), spec.vocab_size)
    with torch.device("meta"):
        shared = torch.empty(0)
        if kind == "eagle3":
            return Eagle3(_with_norms(eagle3_options(config, spec, draft_vocab_size, layers), norms), vocab, shared)
        return Eagle(eagle_options(config, spec, draft_vocab_size), vocab, shared, shared)


def unrolled(kind: Kind, o: TrainOptions, hass: HassLossOptions) -> tuple[int, bool]:
    """How many steps training unrolls, and whether it computes them again in the backward pass."""
    if kind == "eagle3":
        return o.unroll_steps, o.checkpoint_steps
    return (hass.steps, hass.checkpoint_steps) if kind == "hass" else (1, False)


def _with_norms(options: Eagle3Options, norms: Sequence[Norm]) -> Eagle3Options:
    return options.model_copy(update=dict.fromkeys(norms, True))


def fresh_head(
    kind: Kind,
    target: HFTarget,
    vocab: VocabMap,
    layers: tuple[int, ...] | None,
    seed: int,
    norms: Sequence[Norm] = (),
) -> Head:
    """An untrained head in float32: seeded weights; what it can take over from its target begins as the target's.

    Raises:
        ValueError: as `auxiliary_layers`.
        UserError: `norms` of a head that is no EAGLE-3 head.
    """
    if norms and kind != "eagle3":
        raise UserError(f"drafter.norms: only an eagle3 head has such norms, and drafter.kind is {kind}")
    config = target.model.config.get_text_config()
    head: Eagle3 | Eagle
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key("head", seed) % 2**31)
        if kind == "eagle3":
            shape = _with_norms(eagle3_options(config, target.spec, vocab.size, layers), norms)
            head = Eagle3.for_target(shape, vocab, target)
        else:
            head = Eagle.for_target(eagle_options(config, target.spec, vocab.size), vocab, target)
    if isinstance(head, Eagle3):
        head.begin_from(target.model.get_output_embeddings().weight, getattr(target.model.base_model, "norm", None))
    else:
        head.begin()
    return head.to(target.device)


def drafter_in(folder: Path) -> Path:
    """The drafter's own folder, of a run's or of itself."""
    return folder / "drafter" if (folder / "drafter").is_dir() else folder


def started_head(
    folder: Path, kind: Kind, target: HFTarget, draft_vocab_size: int, layers: tuple[int, ...] | None
) -> Head:
    """A trained head to go on from, in float32: a run's, or one that was imported.

    Raises:
        UserError: no head of this target, or another one than the recipe asks for.
        ValueError: as `auxiliary_layers`.
    """
    head = load_drafter(drafter_in(folder), target, torch.float32)
    if not isinstance(head, Eagle3 | Eagle):
        raise UserError(f"drafter.start: {folder} holds a {head.LABEL}; training goes on from heads")
    ours: dict[str, object] = {"kind": "eagle" if kind == "hass" else kind, "draft_vocab_size": draft_vocab_size}
    its: dict[str, object] = {"kind": head.KIND, "draft_vocab_size": head.vocab.size}
    if isinstance(head, Eagle3):
        ours["layers"] = list(auxiliary_layers(layers, target.spec.layers))
        its["layers"] = list(head.options.auxiliary_layers)
    if wanted := [f"drafter.{name}={value}".replace(" ", "") for name, value in its.items() if ours.get(name) != value]:
        raise UserError(f"drafter.start: {folder} is another drafter than the recipe's: set {' '.join(wanted)}")
    return head.train().requires_grad_(True)


def objective(
    kind: Kind,
    head: Trained,
    target: HFTarget,
    o: TrainOptions,
    eagle: EagleLossOptions,
    hass: HassLossOptions,
    chain: int = 1,
) -> Objective:
    """What trains a head of `fresh_head`, or a standalone draft; `chain`: tokens that it will draft in a round."""
    survival = "survival" in o.weights.build().needs
    judge = None if o.judge is None else losses.by_name(o.judge)
    if isinstance(head, Standalone):
        teacher = target.output_rows(None if head.vocab.is_identity else head.vocab.target_ids)
        return DistillationObjective(head, teacher, losses.by_name(o.loss), judge, chain if survival else 0)
    if isinstance(head, Eagle3):
        teacher = target.output_rows(head.vocab.target_ids)
        loss = losses.by_name(o.loss)
        steps = (o.unroll_steps, o.step_decay, o.detach_steps, o.checkpoint_steps)
        return Eagle3Objective(head, teacher, loss, *steps, survival=survival, judge=judge)
    assert isinstance(head, Eagle)
    if kind == "hass":
        return HassObjective(head, hass, survival=survival)
    return EagleObjective(head, eagle)
