"""What happened while decoding, as counts: every number about speed or acceptance derives from these two records.

Milliseconds are shares: when several requests share a round or a prefill, each gets its part, so that sums over
    requests are
wall-clock time, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, cast

from draftsmith.foundation.errors import UserError


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one request: a tree drafted, verified in one target pass, its accepted path and the bonus committed.

    Attributes:
        request: the request's number.
        nodes: drafted nodes verified; the root isn't counted. 0 in plain decoding.
        reached: the depth up to which the tree was put to the test: `accepted`, plus 1 if the tree held a child of
            the last accepted node (which the target then refused).
        accepted: depth of the last accepted node; 0 when no drafted token was accepted.
        committed: tokens committed before the cut at the answer's end: `accepted + 1`, bonus included.
        kept: tokens of those that stay after the cut (end token, limits).
        owners: for each accepted token, the number of the drafter it came from.
        context: committed tokens (prompt included) before the round.
        draft_ms, verify_ms, rest_ms: where the round's time went.
        drafted: verified nodes of each drafter, by number; they add up to `nodes`. Empty where it was not written down.
    """

    request: int
    nodes: int
    reached: int
    accepted: int
    committed: int
    kept: int
    owners: tuple[int, ...]
    context: int
    draft_ms: float
    verify_ms: float
    rest_ms: float
    drafted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.accepted < 0 or self.reached - self.accepted not in (0, 1):
            raise ValueError(
                f"reached must be accepted or accepted + 1, got reached={self.reached}, accepted={self.accepted}"
            )
        if self.committed != self.accepted + 1 or not 0 <= self.kept <= self.committed:
            raise ValueError(f"committed must be accepted + 1 and kept at most that, got {self}")
        if len(self.owners) != self.accepted or self.nodes < self.reached:
            raise ValueError(f"one owner for each accepted token and a node for each depth reached, got {self}")
        if self.drafted and sum(self.drafted) != self.nodes:
            raise ValueError(f"the drafters' nodes must add up to {self.nodes}, got {self.drafted}")

    def to_row(self) -> dict[str, object]:
        """The round as a JSON object."""
        return {**asdict(self), "owners": list(self.owners), "drafted": list(self.drafted)}

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Round:
        """The round of `to_row`. Raises UserError when a field is missing or the counts contradict each other."""
        values = _fields(row, [f.name for f in fields(cls) if f.name != "drafted"], "round")
        try:
            owners = tuple(cast(Sequence[int], values.pop("owners")))
            drafted = tuple(cast(Sequence[int], row.get("drafted", ())))
            return cls(owners=owners, drafted=drafted, **values)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UserError(f"a round of the trace is not valid: {error}; decode again") from error


@dataclass
class Generation:
    """One request's answer and how it came about.

    Attributes:
        request: the request's number.
        token_ids: the answer after the cut; the first token is the prefill's and belongs to no round.
        finish: `"stop"` at an end token, `"length"` at a limit.
        rounds: in order; empty for an answer of one token, and plain decoding may leave them out.
        prefill_ms: the request's share of the prefill.
        total_ms: all of it, prefill included.
    """

    request: int
    token_ids: list[int]
    finish: Literal["stop", "length"]
    rounds: list[Round] = field(default_factory=list)
    prefill_ms: float = 0.0
    total_ms: float = 0.0

    def to_row(self) -> dict[str, object]:
        """The generation as a JSON object, its rounds included."""
        return {
            "request": self.request,
            "token_ids": list(self.token_ids),
            "finish": self.finish,
            "rounds": [r.to_row() for r in self.rounds],
            "prefill_ms": self.prefill_ms,
            "total_ms": self.total_ms,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Generation:
        """The generation of `to_row`. Raises UserError when a field is missing or not valid."""
        values = _fields(row, [f.name for f in fields(cls)], "generation")
        finish = values["finish"]
        if finish not in ("stop", "length"):
            raise UserError(f"the field 'finish' of a generation is {finish!r}; it has to be 'stop' or 'length'")
        return cls(
            request=cast(int, values["request"]),
            token_ids=list(cast(Sequence[int], values["token_ids"])),
            finish=finish,
            rounds=[Round.from_row(r) for r in cast(Sequence[Mapping[str, object]], values["rounds"])],
            prefill_ms=float(cast(float, values["prefill_ms"])),
            total_ms=float(cast(float, values["total_ms"])),
        )


def _fields(row: Mapping[str, object], names: Sequence[str], what: str) -> dict[str, object]:
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(
            f"a {what} lacks the field {missing[0]!r}; it was written by another version or cut short: decode again"
        )
    return {name: row[name] for name in names}
