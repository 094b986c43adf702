"""Is speculative decoding's text plain decoding's? Equal texts are; where two differ, a near tie may explain it.

In exact arithmetic the texts are equal at the same seed. A pass over several rows rounds otherwise than a pass over
one, so where two tokens' scores all but tie either may come out, and what follows can't be compared any more. Only the
first difference is judged, by a teacher-forced pass over what both texts share; `teacher_forced` judges a whole text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from draftsmith.evaluation.summary import Lossless
from draftsmith.foundation import seeding
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.sampling import Sampling, processed

GAP = 1e-4  # float32 (and finer): scores closer than this are a near tie
ULPS = 4  # half precision: scores within so many units in the last place of the row's maximum are
HALF = (torch.bfloat16, torch.float16)
ROWS = 64  # rows judged at once: a row's noise takes V float64 numbers


@dataclass(frozen=True)
class Equality:
    """One comparison.

    Attributes:
        equal: the same tokens.
        first_difference: index of the first answer token that differs; where one text is the start of the other, the
            shorter one's length. None if equal.
        near_tie: both tokens there are within rounding of the row's maximum.
        gap: how far the lower of the two lies below the row's maximum, in score units (logits ÷ temperature); 0 if
            equal, infinite where one text just ends or a token is filtered out.
    """

    equal: bool
    first_difference: int | None
    near_tie: bool
    gap: float

    def to_row(self) -> dict[str, object]:
        """The comparison as a JSON object; an infinite gap is null."""
        return {**asdict(self), "gap": self.gap if math.isfinite(self.gap) else None}


def check(
    target: HFTarget,
    prompt_ids: Sequence[int],
    plain: Sequence[int],
    speculative: Sequence[int],
    sampling: Sampling,
    request: int | str,
    last: int | None = None,
) -> Equality:
    """Compare two answers to a prompt, decoded with the same sampling, seed and request.

    Near ties are DESIGN's: in float32 a gap below 1e-4; in bfloat16 and float16 at most 4 ulp of the row's largest
    logit, divided by the temperature. `last` is the position of the last token that fitted (`forced_eos_token_id`).
    """
    if list(plain) == list(speculative):
        return Equality(True, None, False, 0.0)
    shared = min(len(plain), len(speculative))
    place = next((i for i in range(shared) if plain[i] != speculative[i]), shared)
    if place == shared:
        return Equality(False, place, False, math.inf)
    ids = [*prompt_ids, *plain[: place + 1]]
    hidden = _read(target, ids)
    scores, tolerance = _scores(target, hidden[-1:], ids, range(len(ids) - 1, len(ids)), sampling, request, last)
    row = scores[0]
    gap = float(row.max() - torch.minimum(row[plain[place]], row[speculative[place]]))
    return Equality(False, place, _near(gap, float(tolerance[0]), target.dtype), gap)


def teacher_forced(
    target: HFTarget,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    sampling: Sampling,
    request: int | str = 0,
    last: int | None = None,
) -> int:
    """How many of an answer's tokens lie farther below their row's maximum than rounding explains: 0 is expected.

    One pass over prompt and answer. Rows are as in `check`, so an answer sampled with `request` can be judged too.
    """
    if not answer_ids:
        return 0
    ids = [*prompt_ids, *answer_ids]
    hidden = _read(target, ids)
    far = 0
    for first in range(len(prompt_ids), len(ids), ROWS):
        places = range(first, min(first + ROWS, len(ids)))
        rows = hidden[first - 1 : places.stop - 1]
        scores, tolerance = _scores(target, rows, ids, places, sampling, request, last)
        chosen = torch.tensor([ids[place] for place in places], device=scores.device)
        gaps = scores.amax(dim=1) - scores.gather(1, chosen[:, None])[:, 0]
        judged = zip(gaps.tolist(), tolerance.tolist(), strict=True)
        far += sum(not _near(gap, most, target.dtype) for gap, most in judged)
    return far


def lossless(found: Iterable[Equality]) -> Lossless:
    """The counts of `summary.json`."""
    found = list(found)
    return Lossless(
        checked=len(found), equal=sum(e.equal for e in found), near_ties=sum(e.near_tie and not e.equal for e in found)
    )


def _near(gap: float, tolerance: float, dtype: torch.dtype) -> bool:
    return gap <= tolerance if dtype in HALF else gap < tolerance


def _read(target: HFTarget, ids: Sequence[int]) -> Tensor:
    """Final hidden states `[len(ids) - 1, H]`: row t is what token t + 1 was drawn from."""
    return target.read(torch.tensor([list(ids[:-1])]), [len(ids) - 1], FeatureSpec())["final"][0]


@torch.inference_mode()
def _scores(
    target: HFTarget,
    hidden: Tensor,
    ids: Sequence[int],
    places: range,
    sampling: Sampling,
    request: int | str,
    last: int | None,
) -> tuple[Tensor, Tensor]:
    """What the argmax was taken of, for the tokens at `places`: scores `[R, V]` float64 and tolerances `[R]`.

    Scores are the processed logits and, at temperatures above 0, the keyed Gumbel noise of `sampling.draw`.
    """
    logits = target.project(hidden)
    contexts = [ids[:place] for place in places] if sampling.path_dependent else None
    lasts = None if last is None else [last] * len(places)
    scores = processed(logits, contexts, sampling, lasts).double()
    scale = 1.0
    if sampling.temperature > 0.0:
        scale = sampling.temperature
        positions = torch.tensor([list(places)])
        keys = seeding.position_keys(sampling.seed, [request], positions, "token")[0].to(scores.device)
        scores = scores - torch.log(-torch.log(seeding.uniform(keys, scores.shape[1])))
    if target.dtype in HALF:
        # a number in [2^e, 2^(e+1)) has units of 2^e · eps in its last place
        largest = logits.double().abs().amax(dim=1)
        ulp = torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(target.dtype).eps
        return scores, ULPS * ulp / scale
    return scores, torch.full((len(places),), GAP, dtype=torch.float64)
