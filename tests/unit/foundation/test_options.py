"""Options: what is refused, and that the refusal names file, line, field and the nearest known name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options, digest, load_yaml, override, validate


class Chain(Options):
    kind: Literal["chain"] = "chain"
    length: int = 3


class Dynamic(Options):
    kind: Literal["dynamic"] = "dynamic"
    budget: int = 15


class Train(Options):
    steps: int = Field(100, gt=0)
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    layers: tuple[int, ...] = ()

    @field_validator("layers")
    @classmethod
    def _increasing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("layers must be strictly increasing")
        return value


class Member(Options):
    name: str
    share: float = 1.0


class Recipe(Options):
    target: str
    train: Train = Train()
    members: list[Member] = []
    growth: Annotated[Chain | Dynamic, Field(discriminator="kind")] = Dynamic()
    note: str | None = None


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, *assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(Recipe, override(load_yaml(recipe(tmp_path, text)), assignments), "the command line")
    return str(caught.value).replace(str(tmp_path), "")


def test_a_whole_recipe(tmp_path: Path) -> None:
    text = (
        "target: smollm2\ntrain:\n  steps: 30\n  learning_rate: 1e-3\n"
        "members:\n  - name: a\ngrowth: {kind: chain, length: 4}\n"
    )
    options = validate(Recipe, load_yaml(recipe(tmp_path, text)), "test")
    assert options.train.steps == 30
    assert options.train.learning_rate == 0.001
    assert options.members == [Member(name="a")]
    assert options.growth == Chain(length=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("target: x\ntrain:\n  stpes: 3\n", "/recipe.yaml:3: train.stpes is no option; did you mean train.steps?"),
        ("target: x\ntrian: {}\n", "/recipe.yaml:2: trian is no option; did you mean train?"),
        (
            "target: x\nzzzzz: 1\n",
            "/recipe.yaml:2: zzzzz is no option; known are growth, members, note, target, train",
        ),
        (
            "target: x\nmembers:\n- name: a\n- name: b\n  shore: 2\n",
            "/recipe.yaml:5: members.1.shore is no option; did you mean members.1.share?",
        ),
        (
            "target: x\ngrowth:\n  kind: dynamic\n  budgte: 2\n",
            "/recipe.yaml:4: growth.budgte is no option; did you mean growth.budget?",
        ),
        (
            "target: x\ntrain:\n\n  steps: many\n",
            "/recipe.yaml:4: train.steps must be a whole number, not 'many'",
        ),
        ("target: x\ntrain: {steps: 0}\n", "/recipe.yaml:2: train.steps must be greater than 0, not 0"),
        (
            "target: x\ntrain: {schedule: cosin}\n",
            "/recipe.yaml:2: train.schedule must be 'cosine', 'linear' or 'constant', not 'cosin'; "
            "did you mean 'cosine'?",
        ),
        ("target: x\ntrain:\n  layers: [3, 1]\n", "/recipe.yaml:3: train.layers: layers must be strictly increasing"),
        ("train: {}\n", "/recipe.yaml: target is required"),
        ("target: x\nmembers:\n- name: a\n- share: 2\n", "/recipe.yaml:4: members.1.name is required"),
        ("", "/recipe.yaml: target is required"),
        ("target: x\nmembers:\n- {share: 2}\nnot: 1\n", "/recipe.yaml:3: members.0.name is required (also wrong: not)"),
    ],
)
def test_refusals_name_the_line_and_the_field(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "/recipe.yaml:3: a is given twice (first in line 1): remove one"),
        ("a:\n  b: 2\n  b: 3\n", "/recipe.yaml:3: a.b is given twice (first in line 2): remove one"),
        ("a: [1\nb: 2\n", "/recipe.yaml:2: not valid YAML (expected ',' or ']', but got ':')"),
        ("- a\n- b\n", "/recipe.yaml:1: expected options (name: value), found"),
        ("a: !!python/object:os.system x\n", "/recipe.yaml:1: not valid YAML (could not determine a constructor"),
        ("a: &x\n  b: *x\n", "/recipe.yaml:1: an alias that contains itself"),
    ],
)
def test_broken_yaml_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_yaml(tmp_path)


def test_yaml_values(tmp_path: Path) -> None:
    text = (
        "a: 1e-4\nb: off\nc: 2024-01-01\nd: true\ne: 12:30\nf:\ng: -3\nh: .5\ni: 0.0\nj: 1_000\nk: 0\n"
        "l: '5'\nm: .inf\nn: {<<: {p: 1}}"
    )
    data = load_yaml(recipe(tmp_path, text))
    assert data == {
        "a": 1e-4, "b": "off", "c": "2024-01-01", "d": True, "e": "12:30", "f": None, "g": -3, "h": 0.5, "i": 0.0,
        "j": 1000, "k": 0, "l": "5", "m": float("inf"), "n": {"p": 1},
    }  # fmt: skip
    assert type(data["k"]) is int
    assert type(data["i"]) is float


def test_override_makes_a_new_dictionary() -> None:
    data: dict[str, object] = {"train": {"steps": 3, "rates": [1, 2]}, "note": "x"}
    changed = override(data, ["train.steps=30", "train.rates.1=5e-1", "note=", "new.deep=[1, a]", "text=a=b"])
    assert changed == {
        "train": {"steps": 30, "rates": [1, 0.5]},
        "note": None,
        "new": {"deep": [1, "a"]},
        "text": "a=b",
    }
    assert data == {"train": {"steps": 3, "rates": [1, 2]}, "note": "x"}


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("steps", "is no assignment"),
        ("=3", "is no assignment"),
        ("train..steps=3", "is no assignment"),
        ("note.deep=3", "note is 'x', not a group of options"),
        ("rates.2=3", "rates is a list of 2, without '2'"),
        ("note=[1", "not valid YAML"),
    ],
)
def test_override_refuses(assignment: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        override({"note": "x", "rates": [1, 2]}, [assignment])


def test_an_overridden_value_is_the_command_lines_not_the_files(tmp_path: Path) -> None:
    text = "target: x\ntrain:\n  steps: 3\n  learning_rate: fast\n"
    said = refusal(tmp_path, text, "train.learning_rate=1", "train.steps=none")
    assert said.startswith("the command line: train.steps must be")
    assert refusal(tmp_path, text, "train.steps=-1").startswith("the command line: train.steps must be greater than 0")
    assert refusal(tmp_path, text).startswith("/recipe.yaml:4: train.learning_rate must be")


def test_options_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Train().steps = 4  # type: ignore[misc]


def test_digest_follows_values_not_order_or_defaults() -> None:
    assert digest(Train()) == digest(Train(steps=100))
    assert digest(Train()) != digest(Train(steps=101))
    assert digest({"a": 1, "b": Path("x")}) == digest({"b": "x", "a": 1})
    assert digest({}) == "44136fa355b3678a"  # sha256 of "{}"
