"""Artefacts are whole or not there: kills at every step, a full disk, damage, the same bytes for the same content."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError


class Killed(BaseException):
    """Stands for a kill: no `except Exception` holds it back."""


def make(folder: Path, content: str = "hello", **more: Any) -> None:
    with artefacts.writing(
        folder, "features", {"target": "abc", "options": {"layers": [2, 4], "dtype": "float32"}}, **more
    ) as scratch:
        artefacts.write_jsonl(scratch / "sub" / "rows.jsonl", [{"text": content}])
        artefacts.save_tensors(scratch / "x.safetensors", {"x": torch.arange(3)}, {"b": "1", "a": "2", "c": "3"})


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_json_and_jsonl_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "naïve\u2028 😀\n", "n": 1}, {"n": None, "deep": {"a": [1.5]}}]
    artefacts.write_jsonl(tmp_path / "deep" / "a.jsonl", iter(rows))
    artefacts.write_json(tmp_path / "a.json", rows)
    assert list(artefacts.read_jsonl(tmp_path / "deep" / "a.jsonl")) == rows
    assert artefacts.read_json(tmp_path / "a.json") == rows
    assert names(tmp_path) == ["a.json", "deep/a.jsonl"]


def test_broken_rows_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not valid JSON"):
        list(artefacts.read_jsonl(path))
    path.write_bytes(b"{}\n[1]\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: expected a JSON object, found list"):
        list(artefacts.read_jsonl(path))
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not UTF-8"):
        list(artefacts.read_jsonl(path))
    path.write_text('{\n"a": 1,\n}')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not valid JSON"):
        artefacts.read_json(path)
    for read in (artefacts.read_json, lambda p: list(artefacts.read_jsonl(p)), artefacts.load_tensors):
        with pytest.raises(UserError, match=r"nowhere does not exist"):
            read(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    artefacts.write_jsonl(path, [{"a": 1}])

    def rows() -> Any:
        yield {"a": 2}
        raise Killed

    with pytest.raises(Killed):
        artefacts.write_jsonl(path, rows())
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        artefacts.write_json(path, float("nan"))
    assert list(artefacts.read_jsonl(path)) == [{"a": 1}]
    assert names(tmp_path) == ["a.jsonl"]


def test_tensors_round_trip_also_views_and_shared(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "whole": base,
        "same": base,
        "view": base[1:3],
        "turned": base.T,
        "bf16": base.bfloat16(),
        "none": base[:0],
        "also none": base[:0],
    }
    artefacts.save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = artefacts.load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"x\.safetensors is not a whole safetensors file"):
        artefacts.load_tensors(tmp_path / "x.safetensors")


def test_equal_content_gives_equal_bytes_in_any_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from draftsmith.foundation import artefacts\n"
        "tensors = {'b': torch.ones(3), 'a': torch.zeros(2)}\n"
        "artefacts.save_tensors(Path(sys.argv[1]), tensors, {c: c for c in 'qwertyuiopé'})"
    )
    for name in ("1", "2"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
    reference = {"a": torch.zeros(2), "b": torch.ones(3)}
    artefacts.save_tensors(tmp_path / "3", reference, {c: c for c in reversed("qwertyuiopé")})
    contents = {(tmp_path / name).read_bytes() for name in ("1", "2", "3")}
    assert len(contents) == 1
    loaded = artefacts.load_tensors(tmp_path / "3")
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)
    from safetensors import safe_open

    with safe_open(tmp_path / "3", "pt") as file:
        assert file.metadata() == {c: c for c in "qwertyuiopé"}


def test_a_whole_artefact(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "features"
    make(folder)
    assert names(folder) == ["manifest.json", "provenance.json", "sub/rows.jsonl", "x.safetensors"]
    assert not artefacts.partial(folder).exists()
    meta = artefacts.opened(folder, "features", {"target": "abc", "options": {"layers": (2, 4), "dtype": "float32"}})
    assert meta == {"target": "abc", "options": {"layers": [2, 4], "dtype": "float32"}}
    manifest = artefacts.read_json(folder / "manifest.json")
    assert manifest["format"] == 1
    assert manifest["kind"] == "features"
    assert list(manifest["files"]) == ["sub/rows.jsonl", "x.safetensors"]
    assert manifest["files"]["sub/rows.jsonl"] == {
        "bytes": 18,
        # printf '{"text": "hello"}\n' | sha256sum
        "sha256": "7cda9ec1f0842184c2f10f1b056ef625e75a4749c94b594d0a70c9eda7553262",
    }


def test_the_manifest_is_deterministic_and_the_checksum_follows_content(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    make(tmp_path / "c", "other")
    read = [(tmp_path / name / "manifest.json").read_bytes() for name in "abc"]
    assert read[0] == read[1] != read[2]
    sums = [artefacts.checksum(tmp_path / name) for name in "abc"]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("exception", [RuntimeError, Killed])
def test_an_exception_leaves_the_partial_and_the_older_artefact(tmp_path: Path, exception: type[BaseException]) -> None:
    folder = tmp_path / "a"
    with pytest.raises(exception), artefacts.writing(folder, "features", {}, resume=True) as scratch:
        (scratch / "1").write_text("one")
        raise exception
    assert not folder.exists()
    assert names(artefacts.partial(folder)) == ["1", "work/plan.json"]
    with pytest.raises(UserError, match="a is not finished"):
        artefacts.opened(folder, "features")

    with artefacts.writing(folder, "features", {}, resume=True) as scratch:
        assert names(scratch) == ["1", "work/plan.json"]
        (scratch / "2").write_text("two")
    assert names(folder) == ["1", "2", "manifest.json", "provenance.json"]

    with pytest.raises(exception), artefacts.writing(folder, "features", {}) as scratch:
        (scratch / "3").write_text("three")
        raise exception
    artefacts.opened(folder, "features")
    with artefacts.writing(folder, "features", {}) as scratch:
        assert names(scratch) == []


@pytest.mark.parametrize("other", [{"meta": {"seed": 2}}, {"kind": "scores"}, {"resume": False}])
def test_what_a_run_with_other_options_left_is_cleared(tmp_path: Path, other: dict[str, Any]) -> None:
    first: dict[str, Any] = {"kind": "features", "meta": {"seed": 1}, "resume": True}
    with pytest.raises(Killed), artefacts.writing(tmp_path / "a", **first) as scratch:
        (scratch / "1").write_text("one")
        raise Killed
    with pytest.raises(Killed), artefacts.writing(tmp_path / "a", **first) as scratch:
        assert "1" in names(scratch)
        raise Killed
    with artefacts.writing(tmp_path / "a", **(first | other)) as scratch:
        assert "1" not in names(scratch)


def test_what_only_a_resumed_run_needs_is_no_part_of_the_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"

    def write() -> list[str]:
        with artefacts.writing(folder, "features", {}, resume=True) as scratch:
            found = names(scratch / artefacts.WORK)
            artefacts.write_json(scratch / artefacts.WORK / "batch.json", 1)
            artefacts.write_json(scratch / "result.json", 1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write()
    assert write() == ["batch.json", "plan.json"], "killed just before the rename, it has nothing to do again"
    assert names(folder) == ["manifest.json", "provenance.json", "result.json"]
    assert list(artefacts.read_json(folder / "manifest.json")["files"]) == ["result.json"]
    artefacts.write_json(folder / artefacts.WORK / "batch.json", 1)
    artefacts.opened(folder, "features")
    artefacts.tidy(folder)
    assert not (folder / artefacts.WORK).exists()


STEPS = ["write_json", "_file_entry", "rename", "rmtree", "_flush"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_at_any_step_leaves_old_or_new_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, older: bool, resume: bool
) -> None:
    """Kill before the n-th call of each step, for every n that is reached, then run again."""
    owner: Any = {"rename": Path, "rmtree": shutil}.get(step, artefacts)
    original = getattr(owner, step)
    make(tmp_path / "expected", "new")
    kills = 0
    for n in range(100):
        folder = tmp_path / f"{n}" / "a"
        if older:
            make(folder, "old")
        calls = 0

        def counted(*arguments: Any, n: int = n, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n + 1:
                raise Killed
            return original(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, counted)
            try:
                make(folder, "new", resume=resume)
                finished = True
            except Killed:
                finished = False
                kills += 1
        if folder.exists():  # whatever is there under the name is whole
            artefacts.opened(folder, "features")
        if not finished:
            make(folder, "new", resume=resume)
        artefacts.opened(folder, "features")
        assert (folder / "manifest.json").read_bytes() == (tmp_path / "expected" / "manifest.json").read_bytes()
        assert sorted(path.name for path in folder.parent.iterdir()) == ["a"]
        if finished:
            break
    assert kills > 0 or (step == "rmtree" and not older)


def test_a_kill_between_the_renames_loses_no_older_artefact(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / "a.old")
    with pytest.raises(Killed), artefacts.writing(tmp_path / "a", "features", {}):
        raise Killed
    artefacts.opened(tmp_path / "a", "features")


def test_keep_moves_the_older_artefact_away(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    make(tmp_path / "a", "new", keep=tmp_path / "before")
    make(tmp_path / "a", "newest", keep=tmp_path / "before")
    texts = [next(artefacts.read_jsonl(tmp_path / name / "sub" / "rows.jsonl"))["text"] for name in ("before", "a")]
    assert texts == ["new", "newest"]


def test_meta_may_be_filled_in_while_writing(tmp_path: Path) -> None:
    meta: dict[str, object] = {"a": 1}
    with artefacts.writing(tmp_path / "a", "scores", meta):
        meta["rows"] = 7
    assert artefacts.opened(tmp_path / "a", "scores") == {"a": 1, "rows": 7}


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="was not made by draftsmith"):
        make(tmp_path / "thesis")
    assert names(tmp_path) == ["thesis/thesis.tex"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


def test_opened_names_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(UserError, match="a does not exist"):
        artefacts.opened(folder, "features")
    folder.mkdir()
    with pytest.raises(UserError, match="no artefact of draftsmith"):
        artefacts.opened(folder, "features")
    make(folder)
    with pytest.raises(UserError, match="holds a 'features' artefact, not an 'export' artefact"):
        artefacts.opened(folder, "export")
    with pytest.raises(StaleError, match='target is "abc" there and "xyz" now.*--redo'):
        artefacts.opened(folder, "features", {"target": "xyz"})
    with pytest.raises(StaleError, match=r"options\.layers is \[2, 4\] there and \[2, 5\] now"):
        artefacts.opened(folder, "features", {"options": {"dtype": "float32", "layers": [2, 5]}})
    with pytest.raises(StaleError, match=r'options\.dtype is "float32" there and not set now'):
        artefacts.opened(folder, "features", {"options": {"layers": [2, 4]}})
    with pytest.raises(StaleError, match="seed is not set there and 1 now"):
        artefacts.opened(folder, "features", {"seed": 1})

    good = (folder / "sub" / "rows.jsonl").read_bytes()
    (folder / "sub" / "rows.jsonl").write_bytes(good.replace(b"hello", b"hullo"))
    with pytest.raises(UserError, match=r"rows\.jsonl was changed or damaged \(wrong checksum\)"):
        artefacts.opened(folder, "features")
    artefacts.opened(folder, "features", checksums=False)
    (folder / "sub" / "rows.jsonl").write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"rows\.jsonl has 17 bytes where its manifest says 18"):
        artefacts.opened(folder, "features", checksums=False)
    (folder / "sub" / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl is missing"):
        artefacts.opened(folder, "features")

    artefacts.write_json(folder / "manifest.json", {"format": 2, "kind": "features", "meta": {}, "files": {}})
    with pytest.raises(UserError, match="format 2 was written by another version"):
        artefacts.opened(folder, "features")
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is no manifest"):
        artefacts.opened(folder, "features")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    artefacts.write_json(tmp_path / "a.json", 1)

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    said = rf"the disk is full: writing to {tmp_path} failed \(more than 3.0 KiB needed for a.json, .* free\)"
    with pytest.raises(UserError, match=said):
        artefacts.write_json(tmp_path / "a.json", "x" * 3067)
    with pytest.raises(UserError, match=r"the disk is full.*\(4\.0 KiB needed"):
        artefacts.save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(1024)})
    with (
        pytest.raises(UserError, match="the disk is full"),
        artefacts.writing(tmp_path / "f", "features", {}) as scratch,
    ):
        (scratch / "1").write_text("one")
    assert names(tmp_path) == ["a.json", "f.partial/1"]
    assert artefacts.read_json(tmp_path / "a.json") == 1


def test_a_full_disk_inside_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"the disk is full.*4\.0 KiB needed"):
        artefacts.save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(1024)})
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_while_writing_in_the_block(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"writing to {tmp_path} failed \(3 B written so far"),
        artefacts.writing(tmp_path / "f", "features", {}) as scratch,
    ):
        (scratch / "1").write_text("one")
        with Path("/dev/full").open("w") as file:
            file.write("x")
    assert not (tmp_path / "f").exists()


def test_other_errors_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), artefacts.writing(tmp_path / "f", "features", {}):
        raise PermissionError(errno.EACCES, "no")
