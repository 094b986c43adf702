"""Options: strict models, YAML with line numbers, dotted overrides, errors that name the field and the nearest name."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from draftsmith.foundation.errors import UserError

Path_ = tuple[str | int, ...]  # where a value stands: ("train", "steps"), ("sets", 0, "name")


class Options(BaseModel):
    """Base of all options: unknown keys are refused, values cannot be changed, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


T = TypeVar("T", bound=BaseModel)


class Located(dict[str, object]):
    """A mapping that remembers the file it was read from and the line of each of its keys, at any depth."""

    file: Path | None = None
    lines: dict[Path_, int]


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2: `1e-4` is a number, `off` and `12:30` are text."""


_FLOAT = r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])


def load_yaml(path: Path) -> dict[str, object]:
    """The options of a YAML file; `validate` then names lines. An empty file gives no options.

    Raises:
        UserError: the file is missing, no YAML, no mapping, or has a key twice; the text names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    data = Located()
    data.file, data.lines = path, {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return data
        if not isinstance(node, yaml.MappingNode):
            line_found = f"{path}:{node.start_mark.line + 1}"
            found = "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r:.60}"
            raise UserError(f"{line_found}: expected options (name: value), found {found}")
        _note_lines(node, (), data, path, ())
        data.update(loader.construct_document(node))
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line}: not valid YAML ({problem.problem})") from None
    except yaml.YAMLError as problem:
        raise UserError(f"{path}: not valid YAML ({problem})") from None
    return data


def override(data: Mapping[str, object], assignments: Sequence[str]) -> dict[str, object]:
    """A copy of `data` with dotted assignments carried out: `"train.steps=30"`; values are read as YAML.

    Raises:
        UserError: no `=`, no name, broken YAML, or a step of the name that is no group of options.
    """
    out = Located(_copied(data))
    out.file = data.file if isinstance(data, Located) else None
    out.lines = dict(data.lines) if isinstance(data, Located) else {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        steps = name.strip().split(".")
        if not equals or not all(steps):
            raise UserError(f"{assignment!r} is no assignment: write name=value, for instance train.steps=30")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"{assignment!r}: the value is not valid YAML; put it in quotes") from None
        _assign(out, steps, value, assignment)
        place = tuple(_as_index(step) for step in steps)
        out.lines = {path: line for path, line in out.lines.items() if path[: len(place)] != place}
    return out


def validate(model: type[T], data: Mapping[str, object], where: str) -> T:
    """`data` as checked options.

    Args:
        model: the options' class.
        data: from `load_yaml`, `override` or any mapping.
        where: what to call the source of values that have no line ("the command line").

    Raises:
        UserError: the first wrong option with file and line (or `where`), its dotted name, what is wrong, the allowed
            values or the nearest known name, and the names of the other wrong ones.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        first, *others = [_sentence(model, data, where, error) for error in errors]
        # a union reports one error for each member: the same option is named once
        names = dict.fromkeys(_dotted(_place(data, error)) for error in errors[1:])
        names.pop(_dotted(_place(data, errors[0])), None)
        rest = f" (also wrong: {', '.join(names)})" if others and names else ""
        raise UserError(first + rest) from None


def digest(options: BaseModel | Mapping[str, object]) -> str:
    """A short name of the options' values: the first 16 hex digits of the SHA-256 of their canonical JSON."""
    plain = options.model_dump(mode="json") if isinstance(options, BaseModel) else to_jsonable_python(dict(options))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _note_lines(node: yaml.Node, place: Path_, data: Located, path: Path, above: tuple[yaml.Node, ...]) -> None:
    """Record the line of every key below `node`, refusing keys that occur twice."""
    if any(node is ancestor for ancestor in above):
        raise UserError(f"{path}:{node.start_mark.line + 1}: an alias that contains itself")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in seen:
                dotted = _dotted((*place, name))
                raise UserError(f"{path}:{line}: {dotted} is given twice (first in line {seen[name]}): remove one")
            seen[name] = line
            data.lines.setdefault((*place, name), line)
            _note_lines(value_node, (*place, name), data, path, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            data.lines.setdefault((*place, index), item.start_mark.line + 1)
            _note_lines(item, (*place, index), data, path, (*above, node))


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _as_index(step: str) -> str | int:
    return int(step) if step.isdecimal() else step


def _assign(data: dict[str, Any], steps: Sequence[str], value: object, assignment: str) -> None:
    at: Any = data
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(at, list):
            if not step.isdecimal() or int(step) >= len(at):
                raise UserError(f"{assignment!r}: {'.'.join(steps[:depth])} is a list of {len(at)}, without {step!r}")
            at, index = (at, int(step)) if last else (at[int(step)], int(step))
            if last:
                at[index] = value
        elif isinstance(at, dict):
            if last:
                at[step] = value
            elif at.get(step) is None:
                at[step] = {}
            at = at[step]
        else:
            raise UserError(f"{assignment!r}: {'.'.join(steps[:depth])} is {at!r}, not a group of options")


def _place(data: Mapping[str, object], error: ErrorDetails) -> Path_:
    """The error's location without pydantic's tags of unions, which are no keys of the data."""
    at: Any = data
    place: list[str | int] = []
    location = error["loc"]
    for index, step in enumerate(location):
        held = (isinstance(at, Mapping) and step in at) or (
            isinstance(at, Sequence) and not isinstance(at, str) and isinstance(step, int) and step < len(at)
        )
        if held:
            at = at[step]
            place.append(step)
        elif index == len(location) - 1 and error["type"] == "missing":
            place.append(step)
    return tuple(place)


def _dotted(place: Path_) -> str:
    return ".".join(str(step) for step in place) or "the options"


def _sentence(model: type[BaseModel], data: Mapping[str, object], where: str, error: ErrorDetails) -> str:
    place = _place(data, error)
    name, kind = _dotted(place), error["type"]
    source = where
    if isinstance(data, Located) and data.file is not None:
        # a missing option has no line of its own: name that of the group it belongs to
        line = data.lines.get(place) or (data.lines.get(place[:-1]) if kind == "missing" else None)
        given = kind == "missing" or place in data.lines or not place
        source = f"{data.file}:{line}" if line else str(data.file) if given else where
    if kind == "extra_forbidden":
        known = sorted(_known_names(model, error["loc"][:-1]))
        return f"{source}: {name} is no option{_nearest(place, known)}"
    if kind == "missing":
        return f"{source}: {name} is required"
    if kind == "value_error":
        return f"{source}: {name}: {error['msg'].removeprefix('Value error, ')}"
    said = _PLAINLY.get(kind) or error["msg"].replace("Input should be", "must be")
    found = error["input"]
    allowed = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", ""))) if kind in _CHOICES else []
    near = difflib.get_close_matches(str(found), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{source}: {name} {said}, not {found!r:.80}{hint}"


_CHOICES = ("literal_error", "enum")
# pydantic speaks to programmers in these
_PLAINLY = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "model_type": "must be a group of options (name: value)",
    "model_attributes_type": "must be a group of options (name: value)",
}


def _nearest(place: Path_, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5) if place else []
    if near:
        return f"; did you mean {_dotted((*place[:-1], near[0]))}?"
    return f"; known are {', '.join(known)}" if known else ""


def _known_names(model: type[BaseModel], location: Iterable[Hashable]) -> set[str]:
    """The option names of the models that stand at `location` below `model`."""
    models: set[type[BaseModel]] = {model}
    for step in location:
        below: set[type[BaseModel]] = set()
        for each in models:
            if isinstance(step, str) and step in each.model_fields:
                below |= _models_in(each.model_fields[step].annotation)
        # list indices, keys of dictionaries and tags of unions lead to no other model
        models = below or models
    return {name for each in models for name in each.model_fields}


def _models_in(annotation: object) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    if get_origin(annotation) in (
        Annotated,
        Union,
        types.UnionType,
        list,
        tuple,
        dict,
        set,
        frozenset,
        Sequence,
        Mapping,
    ):
        return {model for argument in get_args(annotation) for model in _models_in(argument)}
    return set()
