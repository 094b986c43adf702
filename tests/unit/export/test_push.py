"""Publishing: what is uploaded, under which name, and what is refused before anything leaves the machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.export.checkpoint import Extras
from draftsmith.export.hand_over import export
from draftsmith.export.push import check_id, machine_paths, push
from draftsmith.foundation.artefacts import opened
from draftsmith.foundation.errors import UserError
from tests.unit.export.heads import card, head

ID = "somebody/tiny-drafter"


class FakeApi:
    """Keeps what the hub would hold, by huggingface_hub's own filter of names."""

    def __init__(self, hub: Path, problem: Exception | None = None) -> None:
        self.hub, self.problem = hub, problem
        self.made: dict[str, Any] = {}

    def create_repo(self, **how: Any) -> str:
        if self.problem:
            raise self.problem
        self.made = how
        return f"https://hub.example/{how['repo_id']}"

    def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: list[str], **how: Any) -> None:
        from huggingface_hub.utils import filter_repo_objects

        assert self.made["repo_id"] == repo_id
        assert how["repo_type"] == "model"
        names = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            (self.hub / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder_path) / name, self.hub / name)


def published(tmp_path: Path, server: str = "vllm", **changes: Any) -> Path:
    drafter = head()
    return export(replace(drafter, target=card(**changes)), server, tmp_path / "out", Extras(published_as=ID)).folder


def test_what_is_uploaded_is_whole_and_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    folder = published(tmp_path)
    assert (folder / "provenance.json").is_file()
    api = FakeApi(tmp_path / "hub")
    assert push(folder, ID, api=api) == f"https://hub.example/{ID}"
    assert api.made == {"repo_id": ID, "private": True, "repo_type": "model", "exist_ok": True}
    hub = tmp_path / "hub"
    assert sorted(p.name for p in hub.iterdir()) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    opened(hub, "export")  # checksums and all
    texts = "".join(p.read_text() for p in hub.iterdir() if p.suffix in (".md", ".json"))
    assert str(tmp_path) not in texts
    assert str(Path.home()) not in texts
    assert f'"model": "{ID}"' in (hub / "README.md").read_text()


@pytest.mark.parametrize("server", ["sglang", "speculators", "gguf"])
def test_the_commands_name_the_repository(server: str, tmp_path: Path) -> None:
    text = (published(tmp_path, server) / "README.md").read_text()
    assert ID in text
    assert str(tmp_path) not in text


def test_a_folder_that_names_a_path_of_this_machine_is_not_pushed(tmp_path: Path) -> None:
    there = tmp_path / "my" / "target"
    there.mkdir(parents=True)
    folder = published(tmp_path, name=str(there))
    assert {text.split(" names ")[0] for text in machine_paths(folder)} >= {"README.md", "config.json"}
    api = FakeApi(tmp_path / "hub")
    with pytest.raises(UserError, match="not pushed: README.md names"):
        push(folder, ID, api=api)
    assert api.made == {}


def test_what_looks_like_a_path_and_is_none_does_not_hinder(tmp_path: Path) -> None:
    folder = published(tmp_path)
    text = (folder / "README.md").read_text()
    assert machine_paths(folder) == []
    (folder / "README.md").write_text(text + "see https://example.org/etc/passwd and a/usr/bin, 3/usr/4\n")
    assert machine_paths(folder) == []
    (folder / "README.md").write_text(text + "trained on ~/data/mine.jsonl and /usr/bin\n")
    assert machine_paths(folder) == ["README.md names ~/data/mine.jsonl", "README.md names /usr/bin"]


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "a/b c", "/a/b", "a/..", "a--b/c", "https://hub/a/b"])
def test_what_is_no_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="owner/name"):
        check_id(name)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="changed or damaged|bytes where"):
        push(folder, ID, api=FakeApi(tmp_path / "hub"))


def test_a_name_that_chooses_the_wrong_method(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eagle-3"):
        export(head(), "vllm", tmp_path / "out", Extras(published_as="somebody/eagle-3-mine"))


def test_the_hubs_refusals_are_told_in_a_sentence(tmp_path: Path) -> None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    folder = published(tmp_path)
    request = httpx.Request("POST", "https://hub.example")
    refusal = HfHubHTTPError("403 Forbidden: no write", response=httpx.Response(403, request=request))
    for problem, named in (
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (refusal, "403 Forbidden: no write"),
        (httpx.ConnectError("no route"), "no route"),
    ):
        with pytest.raises(UserError, match=named):
            push(folder, ID, api=FakeApi(tmp_path / "hub", problem))
