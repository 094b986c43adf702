"""`draftsmith inspect`: what an artefact or a data file holds, and one conversation of it, token by token."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.api import run_target
from draftsmith.commands.terminal import coloured, write_styled
from draftsmith.data import features
from draftsmith.data.conversations import Conversation, Message, from_row, read_conversations
from draftsmith.data.features import FeatureStore, StoredSample
from draftsmith.data.samples import samples_of
from draftsmith.evaluation.report import flatness as corpus
from draftsmith.evaluation.report.inputs import Scored
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.numerics.distributions import flatness_from_log_norm
from draftsmith.selection.samples import Selection
from draftsmith.target.detokenise import token_texts

ANSWER = "bold #2f8f37"
# The half of the answer that is least flat stays as it is; the rest is split evenly over these backgrounds.
FLATNESS = ("#3a2f0b", "#5a430c", "#7d560b", "#a5660a", "#d07408")


def inspect(
    path: Path, row: int = 0, flatness: bool = False, target: str | None = None, html: Path | None = None
) -> None:
    """Show an artefact's kind, meta and files, and conversation number `row` where there are conversations in it.

    Args:
        path: an artefact's folder, or a data file (jsonl, json, parquet, a folder of them).
        row: which conversation or sample, counted from 0.
        flatness: colour the answer's tokens by how flat the target's distribution was, and show how flat it is over
            all of them; feature stores only.
        target: whose tokenizer and template are used; default: that of the run the artefact lies in. Without any,
            conversations are shown as text and samples as ids.
        html: with `flatness`, a page to write of the corpus's distribution and some answers, sample `row` the first.

    Raises:
        UserError: there is nothing there, it is damaged, has no such row, or holds no flatness.
    """
    kind = _artefact(path) if (path / artefacts.MANIFEST).is_file() else None
    if flatness and kind != features.KIND:
        raise UserError(f"{path} is no feature store, so it holds no flatness: give the folder that `score` wrote")
    if html is not None and not flatness:
        raise UserError("--html writes a page of flatness: give --flatness too")
    target = target or _run_target(path)
    if kind == features.KIND:
        if (path / "index.jsonl").is_file():
            store = FeatureStore(path, checksums=False)
            _show_sample(store, row, flatness, target, path)
            if flatness:
                _show_corpus(store, row, target, path, html)
    elif kind is not None:
        rows = (one for name in sorted(path.glob("*.jsonl")) for one in artefacts.read_jsonl(name))
        if found := [from_row(one) for one in rows if "messages" in one]:
            _show_conversation(found, row, target, path)
    else:
        conversations, quarantine = read_conversations(path)
        console.say(f"{console.count(len(conversations))} conversations; {quarantine}")
        for bad in quarantine.rows[:3]:
            console.say(f"  {bad.file}:{bad.line}: {bad.reason}")
        _show_conversation(conversations, row, target, path)


def _run_target(path: Path) -> str | None:
    """The target of the run that an artefact lies in."""
    return run_target(path.parent)[0] if (path.parent / "recipe.yaml").is_file() else None


def _artefact(folder: Path) -> str:
    """Print what the manifest says; returns the kind."""
    kind = str(artefacts.read_json(folder / artefacts.MANIFEST).get("kind"))
    meta = artefacts.opened(folder, kind, checksums=False)
    console.heading(f"{folder}: {kind}")
    console.table(None, ["meta", "value"], list(_flat(meta)), align_right_from=2)
    sizes = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()]
    rows = [[name, console.size(size)] for name, size in sizes]
    console.table(None, ["file", "size"], [*rows, ["in all", console.size(sum(size for _, size in sizes))]])
    return kind


def _flat(meta: Mapping[str, Any], above: str = "") -> Iterator[list[object]]:
    for name, value in meta.items():
        dotted = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{dotted}.")
        else:
            text = str(value)
            yield [dotted, text if len(text) <= 90 else f"{text[:89]}…"]


def _show_conversation(found: Sequence[Conversation], row: int, target: str | None, path: Path) -> None:
    conversation = found[_checked(row, len(found), path, "conversations")]
    source = f", from {conversation.source}" if conversation.source else ""
    console.heading(f"conversation {row} of {len(found)}: {conversation.id}{source}")
    if target is None or conversation.waits:
        for message in conversation.messages:
            _show_message(message)
    else:
        tokenizer = load_tokenizer(target)
        for sample in samples_of(conversation, tokenizer):
            _show_tokens(token_texts(tokenizer, sample.ids), sample.mask, sample.complete)
    if conversation.reference is not None:
        console.say(f"reference: {conversation.reference}")


def _show_message(message: Message) -> None:
    console.write(f"{message.role}: ", "dim")
    console.write(message.content or "(to be written)", ANSWER if message.role == "assistant" else "")
    console.say("")


def _show_sample(store: FeatureStore, row: int, flatness: bool, target: str | None, path: Path) -> None:
    sample = store[_checked(row, len(store), path, "samples")]
    console.heading(f"sample {row} of {len(store)}: {sample.id}")
    ids = sample.ids.tolist()
    if target is None:
        texts = [f"{token} " for token in ids]
    else:
        texts = token_texts(load_tokenizer(target), ids)
    mask = [bool(flag) for flag in sample.mask.tolist()]
    if not flatness:
        _show_tokens(texts, mask, sample.complete)
        return
    values = _flatness(sample, int(store.meta["vocab_size"]))
    borders = shade_borders([value for value in values if value is not None])
    styles = [_shade(value, borders) if value is not None else "dim" for value in values]
    write_styled(texts, styles)
    console.say("")
    known = [value for value in values if value is not None]
    console.say(f"{len(known)} answer tokens, mean flatness {sum(known) / max(1, len(known)):.4f}")
    if borders:
        console.write("shades begin at")
        for border, shade in zip(borders, FLATNESS, strict=True):
            console.write(" ")
            console.write(f" {border:.4f} ", f"on {shade}")
        console.say("")


def _show_corpus(store: FeatureStore, row: int, target: str | None, path: Path, html: Path | None) -> None:
    """How flat the distribution is over all answers of a store, here and as a page."""
    vocab_size = int(store.meta["vocab_size"])
    scores = [
        Scored(sample.id, [value for value in _flatness(sample, vocab_size) if value is not None], None)
        for sample in store
    ]
    bins = corpus.distribution(scores)
    most = max((share for *_, share in bins), default=1.0)
    body = [[f"{a:.4f}", f"{b:.4f}", f"{share:.1%}", "█" * round(30 * share / most)] for a, b, share in bins]
    known = sum(len(one.flatness) for one in scores)
    console.table(f"{console.count(known)} answer tokens by flatness", ["from", "to", "share", ""], body)
    if html is None:
        return
    tokenizer = None if target is None else load_tokenizer(target)

    def texted(one: Scored) -> Scored:
        sample = store[one.id]
        ids = sample.ids.tolist()
        texts = [f"{token} " for token in ids] if tokenizer is None else token_texts(tokenizer, ids)
        answer = sample.mask.tolist()
        return replace(one, pieces=[text for i, (text, on) in enumerate(zip(texts, answer, strict=True)) if i and on])

    first = scores[row]
    examples = [("this one", sum(first.flatness) / len(first.flatness), first)] if first.flatness else []
    examples += [example for example in corpus.shown(scores) if example[2].id != first.id]
    written = corpus.write_flatness_page(
        scores, [(what, mean, texted(one)) for what, mean, one in examples], _kept(path), str(path), html
    )
    console.say(f"a page of them: {written}")


def _kept(path: Path) -> set[str] | None:
    """What a selection beside the store kept, where the store is a run's."""
    rows = path.parent / "selection" / "selection.jsonl"
    return set(Selection.from_rows(artefacts.read_jsonl(rows)).kept) if rows.is_file() else None


def _flatness(sample: StoredSample, vocab_size: int) -> list[float | None]:
    """How flat the distribution was that each answer token comes from (the row before it); None for prompt tokens."""
    before: list[float] = flatness_from_log_norm(sample.statistics["log_norm"], vocab_size).tolist()
    mask = sample.mask.tolist()
    return [before[i - 1] if i and mask[i] else None for i in range(len(mask))]


def shade_borders(values: Sequence[float]) -> list[float]:
    """The values at which each shade of `FLATNESS` begins: the upper half of the values in equal parts."""
    ranked = sorted(values)
    shares = (0.5 + 0.5 * k / len(FLATNESS) for k in range(len(FLATNESS)))
    return [ranked[min(len(ranked) - 1, int(len(ranked) * share))] for share in shares] if ranked else []


def _shade(value: float, borders: Sequence[float]) -> str:
    place = bisect_right(borders, value)
    return f"on {FLATNESS[place - 1]}" if place else ""


def _show_tokens(texts: Sequence[str], mask: Sequence[bool], complete: bool) -> None:
    if coloured():
        write_styled(texts, [ANSWER if answer else "dim" for answer in mask])
    else:
        # where no colour is seen, brackets stand around what is an answer's
        for answer, group in itertools.groupby(zip(texts, mask, strict=True), key=lambda item: item[1]):
            text = "".join(text for text, _ in group)
            console.write(f"⟦{text}⟧" if answer else text)
    console.say("")
    cut = "" if complete else "; cut at the limit, so it teaches no end"
    console.say(f"{len(texts)} tokens, {sum(mask)} of them the answer's{cut}")


def _checked(row: int, count: int, path: Path, what: str) -> int:
    if not 0 <= row < count:
        raise UserError(f"{path} has {count} {what}, so there is no number {row}: count from 0")
    return row


def load_tokenizer(target: str) -> Any:
    """A target's tokenizer without its weights: folder, hub id, GGUF file or `smollm2`."""
    from transformers import AutoTokenizer

    from draftsmith.target import gguf

    place = target
    if target == "smollm2":
        place = str(gguf.convert(gguf.smollm2(), gguf.cache_root()))
    elif target.endswith(".gguf"):
        place = str(gguf.convert(Path(target), gguf.cache_root()))
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as problem:
        raise UserError(f"{target}: no tokenizer can be loaded from there: {str(problem).splitlines()[0]}") from problem
