"""Who answers in a measurement: draftsmith's engine with or without drafters, or somebody else beside it.

A mode gets token ids and gives token ids with a trace, whoever it is, so that everything is counted alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from draftsmith.decoding.composition import Composition
from draftsmith.decoding.engine import Engine, Piece
from draftsmith.decoding.trace import Generation
from draftsmith.evaluation.measured import PLAIN
from draftsmith.target.protocol import Target
from draftsmith.target.sampling import Sampling

Maker = Literal["draftsmith", "transformers", "server"]


@dataclass
class Decoded:
    """One answer.

    Attributes:
        generation: its tokens, rounds and times.
        origins: for each token the drafter's number, −1 for the target's own.
        depths: for each token its depth in the tree, 0 for the target's own.
        first_token_ms: milliseconds from the request to its first token, the whole batch's prefill included.
    """

    generation: Generation
    origins: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    first_token_ms: float = 0.0


class Mode(Protocol):
    """Somebody who answers."""

    @property
    def name(self) -> str: ...

    @property
    def engine(self) -> Maker:
        """Whose engine it is."""
        ...

    @property
    def against(self) -> str:
        """The mode that speed-ups are over: plain decoding in the same engine, where that is measured too."""
        ...

    @property
    def node_budget(self) -> int | None:
        """Drafted nodes of a round at most, if one number says it."""
        ...

    def decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[str], sampling: Sampling, max_new_tokens: int
    ) -> list[Decoded]:
        """Answer a batch of prompts (token ids, the generation prompt included); `requests` names them in draws."""
        ...


class EngineMode:
    """draftsmith's engine; without a composition it decodes plainly."""

    engine: Maker = "draftsmith"

    def __init__(self, name: str, target: Target, composition: Composition | None = None) -> None:
        self.name = name
        self.against = PLAIN
        self.composition = composition
        self._engine = Engine(target, composition)

    @property
    def node_budget(self) -> int | None:
        return self.composition.budget if self.composition else None

    @property
    def members(self) -> tuple[str, ...]:
        """The drafters' names by number, as traces' owners count them; none where there is no more than one."""
        names = self.composition.names if self.composition else ()
        return names if len(names) > 1 else ()

    def decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[str], sampling: Sampling, max_new_tokens: int
    ) -> list[Decoded]:
        """The engine's answers, in the order of the prompts."""
        origins: list[list[int]] = [[] for _ in prompts]
        depths: list[list[int]] = [[] for _ in prompts]
        first: dict[int, float] = {}
        done: dict[int, Generation] = {}
        started = time.perf_counter()
        for event in self._engine.stream(prompts, sampling, max_new_tokens, requests):
            b = event.request
            if isinstance(event, Piece):
                first.setdefault(b, (time.perf_counter() - started) * 1e3)
                origins[b] += event.owners
                depths[b] += event.depths
            else:
                done[b] = event
        return [Decoded(done[b], origins[b], depths[b], first.get(b, 0.0)) for b in range(len(prompts))]
