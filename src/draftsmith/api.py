"""The public interface: load a target with what drafts for it, and let it answer.

model = draftsmith.load("smollm2", drafters="runs/quickstart")
answer = model.generate([{"role": "user", "content": "Why is the sky blue?"}])
print(answer.text, answer.acceptance_length)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, overload

from draftsmith.decoding.building import build
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.costs import refuse_other_target
from draftsmith.decoding.engine import Engine, Piece
from draftsmith.decoding.growth import Growth, GrowthOptions
from draftsmith.decoding.stored import GROWTH_FILES, drafter_folder, members, run_growth
from draftsmith.decoding.trace import Generation
from draftsmith.decoding.verification import Verification
from draftsmith.drafters.base import Drafter
from draftsmith.evaluation import metrics
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import load_yaml, validate
from draftsmith.target import chat
from draftsmith.target.chat import Messages
from draftsmith.target.detokenise import Detokeniser
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.sampling import Sampling

__all__ = ["GROWTH_FILES", "Answer", "Model", "Stream", "TextPiece", "load", "run_growth", "run_target"]


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about.

    Attributes:
        text: without special tokens.
        token_ids: the end token included where one was written.
        prompt_ids: what the target read.
        generation: rounds and times.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    generation: Generation

    @property
    def finish(self) -> Literal["stop", "length"]:
        """`stop` at an end token, `length` at a limit."""
        return self.generation.finish

    @property
    def acceptance_length(self) -> float:
        """τ: tokens committed in a round, bonus included; 1 in plain decoding, NaN for an answer without a round."""
        return metrics.count([self.generation]).acceptance_length

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens ÷ seconds, prefill included."""
        return metrics.count([self.generation]).tokens_per_second


@dataclass(frozen=True)
class TextPiece:
    """What one round added to an answer, as text.

    Attributes:
        request: which prompt it belongs to.
        texts: one for each token; a character whose bytes come in several tokens stands at the last of them.
        token_ids: the tokens.
        owners: which drafter proposed each, −1 for the target's own.
        depths: how deep each stood in the draft tree, 0 for the target's own.
    """

    request: int
    texts: list[str]
    token_ids: list[int]
    owners: list[int]
    depths: list[int]

    @property
    def text(self) -> str:
        """The tokens' text together: what the answer grew by."""
        return "".join(self.texts)


class Stream(Iterator[TextPiece]):
    """An answer, or several, while they are written: iterate for the pieces; `answers` holds those that have ended."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], tokenizer: Any, sampling: Sampling, max_new_tokens: int
    ) -> None:
        self.answers: dict[int, Answer] = {}
        self._engine, self._tokenizer = engine, tokenizer
        self._prompts = [list(p) for p in prompts]
        self._pieces = self._read(engine.stream(self._prompts, sampling, max_new_tokens), max_new_tokens)

    @property
    def answer(self) -> Answer:
        """The only prompt's answer, once it has ended."""
        return self.answers[0]

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    def close(self) -> None:
        """End the decoding; an answer that has not ended will not be in `answers`."""
        self._pieces.close()

    def _read(self, events: Iterator[Piece | Generation], most: int) -> Generator[TextPiece]:
        spec = self._engine.target.spec
        streams = [Detokeniser(self._tokenizer) for _ in self._prompts]
        left = [min(most, spec.max_positions - len(p)) for p in self._prompts]
        texts = ["" for _ in self._prompts]
        for event in events:
            b = event.request
            if isinstance(event, Generation):
                self.answers[b] = Answer(texts[b], event.token_ids, self._prompts[b], event)
                continue
            piece = [streams[b].push(token) for token in event.token_ids]
            left[b] -= len(piece)
            if not left[b] or event.token_ids[-1] in spec.eos_ids:
                piece[-1] += streams[b].flush()
            texts[b] += "".join(piece)
            yield TextPiece(b, piece, event.token_ids, event.owners, event.depths)


One = str | Sequence[int] | Messages
Several = list[str] | Sequence[Sequence[int]] | Sequence[Messages]


class Model:
    """A target and who drafts for it (`composition` None: plain decoding). It answers one call at a time."""

    def __init__(
        self, target: HFTarget, composition: Composition | None = None, verification: Verification = "keyed"
    ) -> None:
        self.target = target
        self.composition = composition
        self._engine = Engine(target, composition, verification)

    @overload
    def generate(
        self,
        prompt: One,
        *,
        stream: Literal[False] = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: Several,
        *,
        stream: Literal[False] = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        **sampling: Any,
    ) -> list[Answer]: ...

    @overload
    def generate(
        self,
        prompt: One | Several,
        *,
        stream: Literal[True],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        **sampling: Any,
    ) -> Stream: ...

    def generate(
        self,
        prompt: One | Several,
        *,
        stream: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        **sampling: Any,
    ) -> Answer | list[Answer] | Stream:
        """Answer a prompt, or several in one batch.

        The text is the target's own at this seed, whoever drafts (in exact arithmetic, token for token). With a
        verification other than keyed its distribution is the target's own.

        Args:
            prompt: messages (rows or objects with `role` and `content`), a string (one user message), token ids (read
                as they are, no template), or a list of any of these.
            stream: return a `Stream` of pieces instead of waiting.
            max_new_tokens: of each answer; the target's longest position bounds it too.
            temperature: 0 takes the most likely token.
            seed: of the draws; a prompt's place in the list is part of them.
            sampling: further options of `Sampling` (`top_p`, `top_k`, `min_p`, `repetition_penalty`, …).

        Returns:
            An `Answer` for one prompt, a list of them for a list, or the `Stream`.

        Raises:
            UserError: an empty prompt, one that leaves no room for an answer, an unknown or wrong option, or messages
                for a target without a chat template.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least 1 token")
        o = validate(Sampling, {"temperature": temperature, "seed": seed, **sampling}, "generate")
        prompts, single = self._prompts(prompt)
        pieces = Stream(self._engine, prompts, self.target.tokenizer, o, max_new_tokens)
        if stream:
            return pieces
        for _ in pieces:
            pass
        answers = [pieces.answers[b] for b in range(len(prompts))]
        return answers[0] if single else answers

    def _prompts(self, prompt: One | Several) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether there is just one, not a list of one."""
        if isinstance(prompt, str) or (len(prompt) and not _is_several(prompt)):
            return [self._ids(cast(One, prompt))], True
        if not len(prompt):
            raise UserError("there is no prompt: give messages, token ids, or a list of either")
        return [self._ids(one) for one in cast(Sequence[One], prompt)], False

    def _ids(self, prompt: One) -> list[int]:
        if isinstance(prompt, str):
            return chat.prompt_ids(self.target.tokenizer, [{"role": "user", "content": prompt}])
        if all(isinstance(part, int) for part in prompt):
            return [int(cast(int, part)) for part in prompt]
        return chat.prompt_ids(self.target.tokenizer, cast(Messages, prompt))


def load(
    target: str | Path | HFTarget | None = None,
    drafters: str | Path | Mapping[str, str | Path | Drafter] | None = None,
    growth: GrowthOptions | Growth | None = None,
    dtype: str = "auto",
    device: str = "auto",
    compose: str | Mapping[str, object] | None = None,
    verification: Verification = "keyed",
) -> Model:
    """Load a target and, if named, a drafter for it, or several put together.

    Args:
        target: folder, hub id, GGUF file, `smollm2`, or one that is loaded already; None: the target of the run that
            `drafters` names.
        drafters: a drafter artefact or a run's folder (its drafter, and the growth that was chosen for it), or several
            by name; None decodes plainly.
        growth: how trees grow; default: the run's, else `GrowthOptions()`.
        compose: how several are put together, such as `merge:trie(math,chat,ngram,budget=15)` (`decoding/
            specification.py`); `ngram` is always there, a single folder is called `drafter`.
        dtype, device: as in `load_target`; `auto` for a run's own target means those of the run.
        verification: keyed writes plain decoding's text at the same seed, whatever is drafted; token (min(1, p/q),
            SpecInfer's rule) and block keep the target's distribution and need a growth of kind sampled.

    Raises:
        UserError: something is not there, is damaged, or was trained for another target.
    """
    named = {"drafter": drafters} if isinstance(drafters, str | Path) else dict(drafters or {})
    if target is None:
        folders = [Path(d) for d in named.values() if isinstance(d, str | Path)]
        if not folders:
            raise UserError("name a target: a folder, a hub id, a GGUF file or smollm2")
        target, *own = run_target(next((f for f in folders if (f / "recipe.yaml").is_file()), folders[0]))
        dtype, device = (one if given == "auto" else given for given, one in zip((dtype, device), own, strict=True))
    loaded = target if isinstance(target, HFTarget) else load_target(target, dtype, device)
    if not named and compose is None:
        return Model(loaded)
    if compose is None and len(named) > 1:
        raise UserError(f"say how {', '.join(named)} are put together: compose='merge:trie({','.join(named)})'")
    for folder in (d for d in named.values() if isinstance(d, str | Path)):
        drafter_folder(Path(folder))
    found = members(named, loaded)
    if growth is not None:
        found = {name: replace(member, growth=None) for name, member in found.items()}
    if isinstance(growth, GrowthOptions) and growth.profile is not None:
        refuse_other_target(growth.profile, loaded.spec.fingerprint)
    made = build(compose or next(iter(named)), found, growth, loaded.tokenizer.decode)
    return Model(loaded, made, verification)


def run_target(run: Path) -> tuple[str, str, str]:
    """Name, dtype and device of a run's target, from its recipe.

    Raises:
        UserError: there is no recipe in the folder, or it names no target.
    """
    path = run / "recipe.yaml"
    if not run.is_dir():
        raise UserError(
            f"there is no run at {run}: make one (draftsmith quickstart --run {run}), or give another folder"
        )
    if not path.is_file():
        raise UserError(f"{run} holds no recipe.yaml that says which target it is for: name the target")
    stored = load_yaml(path).get("target")
    o = stored if isinstance(stored, Mapping) else {"name": stored}
    if not isinstance(o.get("name"), str):
        raise UserError(f"{path}: target.name is missing: name the target")
    return str(o["name"]), str(o.get("dtype") or "auto"), str(o.get("device") or "auto")


def target_of(folders: Iterable[str]) -> str:
    """The target that the first run among folders of runs and drafters names.

    Raises:
        UserError: none of them is a run.
    """
    run = next((Path(folder) for folder in folders if (Path(folder) / "recipe.yaml").is_file()), None)
    if run is None:
        raise UserError("name a target (--target), or a run, which names its own (--drafters RUN)")
    return run_target(run)[0]


def _is_several(prompt: Sequence[object]) -> bool:
    """Whether a list holds prompts, and not one prompt's token ids or messages."""
    first = prompt[0]
    return isinstance(first, str) or (isinstance(first, Sequence) and not isinstance(first, Mapping))
