from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.decoding.building import Available, build
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, GrowthOptions
from draftsmith.decoding.hedging import HedgeRule
from draftsmith.decoding.merging import Merge
from draftsmith.decoding.routing import ConfidenceRoute, EntropyRule, KeywordRule, Route
from draftsmith.decoding.specification import Combined, Member, names_in, parse
from draftsmith.foundation.artefacts import write_json
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import load_yaml
from tests.exactness.members import COMPOSITIONS, oracles
from tests.tiny import OracleDrafter, tiny_head

TEXTS = [[9, 10, 11, 12]]


@pytest.mark.parametrize(
    "line",
    [
        *COMPOSITIONS.values(),
        "math",
        "math@chain:4",
        "average(math,chat,weights=0.5/0.5)",
        "merge:trie(average(math,chat),ngram,budget=15,calibrated=true)",
        'route:keyword(math=solve|"two words",chat)'.replace('"two words"', "two words"),
        "route:learned(math,chat,router=runs/router.json,every=2)",
    ],
)
def test_what_is_read_is_written_again(line: str) -> None:
    spec = parse(line)
    assert parse(str(spec)) == spec
    assert str(parse(f"  {line} ".replace(",", " , ").replace("(", " ( "))) == str(spec)


def test_a_line_says_what_it_says() -> None:
    spec = parse("merge:trie(route:hedge(math,chat,every=4), ngram@chain:3, budget=15)")
    assert isinstance(spec, Combined)
    assert spec.kind == "merge:trie"
    inner, ngram = spec.members
    assert isinstance(inner, Combined)
    assert [str(m) for m in inner.members] == ["math", "chat"]
    assert inner.options.every == 4  # type: ignore[attr-defined]
    assert isinstance(ngram, Member)
    assert ngram.growth == GrowthOptions(kind="chain", depth=3)
    assert spec.options.budget == 15  # type: ignore[attr-defined]
    assert names_in(spec) == ["math", "chat", "ngram"]


def test_yaml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(
        """
kind: merge:trie
budget: 15
members:
  - kind: route:hedge
    members: [math, {drafter: chat, growth: {kind: dynamic, node_budget: 9, depth: 3, width: 2}}]
    every: 4
  - ngram@chain:3
""",
        encoding="utf-8",
    )
    found = parse(load_yaml(path))
    line = parse("merge:trie(route:hedge(math,chat@dynamic:9/3/2,every=4),ngram@chain:3,budget=15)")
    assert isinstance(found, Combined)
    assert isinstance(line, Combined)
    assert found.options == line.options
    assert found.members[1] == line.members[1]
    assert found.members[0].members[1].growth == line.members[0].members[1].growth  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "said", "character"),
    [
        ("", "expected the name of a drafter", 1),
        ("merge:try(math,chat)", "did you mean 'merge:trie'?", 1),
        ("merge:trie(math,chat", "expected ',' or ')'", 21),
        ("merge:trie(math chat)", "expected ',' or ')'", 17),
        ("merge:trie(math,,chat)", "expected the name of a drafter", 17),
        ("merge:trie", "needs its members in parentheses", 11),
        ("merge:trie()", "expected the name of a drafter", 12),
        ("merge:trie(math,budget=0)", "budget", 11),
        ("merge:trie(math,bugdet=9)", "did you mean budget?", 11),
        ("merge:trie(math,budget=9,budget=8)", "budget is given twice", 26),
        ("merge:trie(budget=9)", "merge:trie needs members", 11),
        ("merge:trie(math,math)", "math is a member twice", 11),
        ("merge:trie(math,budget=)", "expected a value", 24),
        ("math@tree:3", "there is no growth 'tree'", 6),
        ("math@chain:3/4", "a depth, as in chain:4", 6),
        ("math@dynamic:0/4/4", "node_budget", 6),
        ("math:chain", "a growth stands after @", 5),
        ("math)", "nothing more was expected", 5),
        ("average(math,chat,weights=0.5)", "1 weights for 2 members", 8),
        ("route:hedge(math,chat,feedback=all)", "feedback", 12),
        ("route:keyword(math=a,chat=b)", "one member without words", 14),
        ("route:keyword(math=a,chat,default=code)", "code is no member", 14),
        ("route:learned(math,chat)", "router is required", 14),
    ],
)
def test_errors_point_at_the_place(line: str, said: str, character: int) -> None:
    with pytest.raises(UserError) as problem:
        parse(line)
    assert said in str(problem.value)
    assert f"(character {character})" in str(problem.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"members": ["math"]}, "kind must be one of"),
        ({"kind": "merge:trie", "members": "math"}, "members must be a list"),
        ({"kind": "merge:trie", "members": ["math", 3]}, "the composition.members[1] must be a name"),
        ({"kind": "merge:trie", "members": ["math", {"drafter": "chat", "depth": 3}]}, "members[1]: depth is no part"),
        (
            {"kind": "merge:trie", "members": [{"drafter": "chat", "growth": {"dept": 3}}]},
            "members[0].growth: dept is no option; did you mean depth?",
        ),
        ({"kind": "merge:trie", "members": ["math"], "bugdet": 3}, "bugdet is no option; did you mean budget?"),
        ({"kind": "route:entropy", "members": ["merge:trie(math"]}, "members[0] 'merge:trie(math'"),
    ],
)
def test_errors_of_yaml_name_the_key(data: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as problem:
        parse(data)
    assert said in str(problem.value)


def test_compositions_are_built_as_named() -> None:
    members = oracles(TEXTS)
    growth = DynamicGrowth(10, 4, 3)
    own = {**members, "sure": Available(members["sure"].drafter, ChainGrowth(2))}
    single = build("sure", own, growth)
    assert single == Single(members["sure"].drafter, ChainGrowth(2), "sure")
    assert build("half@chain:3", own, growth) == Single(members["half"].drafter, ChainGrowth(3), "half@chain:3")
    concat = build("merge:concat(half,sure)", own, growth)
    assert isinstance(concat, Merge)
    assert concat.budget == 12
    assert concat.names == ("half", "sure")
    trie = build("merge:trie(half,sure)", own, growth)
    assert trie.budget == 10
    assert build("merge:trie(half,sure,budget=99)", own, growth).budget == 99
    nested = build("merge:trie(route:hedge(poor,sure),ngram)", own, growth)
    assert nested.names == ("poor", "sure", "ngram")
    for line, rule in (("hedge(half,sure)", HedgeRule), ("entropy(half,sure)", EntropyRule)):
        route = build(f"route:{line}", own, growth)
        assert isinstance(route, Route)
        assert isinstance(route.rule, rule)
    assert isinstance(build("route:confidence(half,sure)", own), ConfidenceRoute)
    keyword = build("route:keyword(half=a|b,sure)", own, growth, str)
    assert isinstance(keyword, Route)
    assert isinstance(keyword.rule, KeywordRule)
    assert (keyword.rule.words, keyword.rule.default) == ((("a", "b"), ()), 1)
    averaged = build("average(a,b,weights=1/0)", {"a": tiny_head(seed=1), "b": tiny_head(seed=2)})
    assert averaged.names == ("average(a,b,weights=1.0/0.0)",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("merge:trie(halve,sure)", "no drafter is called 'halve'; did you mean 'half'?"),
        ("average(half,sure)", "half has no weights"),
        ("average(half,sure@chain:3)", "average takes drafters' names, not sure@chain:3"),
        ("route:hedge(merge:trie(half,sure),poor)", "merge:trie(half,sure) has none"),
        ("merge:trie(half@adaedl:3,sure)", "half@adaedl:3 grows by adaedl"),
        ("route:keyword(half=a,sure)", "needs the target's tokenizer"),
        ("merge:trie(half,sure,calibrated=true)", "half was not calibrated"),
    ],
)
def test_what_cannot_be_put_together_is_refused(line: str, said: str) -> None:
    with pytest.raises(UserError) as problem:
        build(line, oracles(TEXTS), DynamicGrowth(10, 4, 3))
    assert said in str(problem.value)


def test_temperatures_come_from_the_drafter_or_a_file(tmp_path: Path) -> None:
    drafter = OracleDrafter(TEXTS, 0.5)
    members = {"a": Available(drafter, None, (2.0, 3.0)), "b": Available(drafter)}
    one = build("merge:trie(a,calibrated=true)", members)
    assert isinstance(one, Merge)
    assert one.parts[0].drafter.temperatures == (2.0, 3.0)  # type: ignore[attr-defined]
    write_json(tmp_path / "t.json", {"drafters": {"a": {"temperatures": [0.5]}, "b": {"temperatures": [4]}}})
    both = build(f"route:confidence(a,b,calibrated={tmp_path / 't.json'})", members)
    assert isinstance(both, ConfidenceRoute)
    assert [p.drafter.temperatures for p in both.parts] == [(0.5,), (4.0,)]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="holds no temperatures of c"):
        build(f"merge:trie(a,c,calibrated={tmp_path / 't.json'})", {**members, "c": drafter})


def test_a_trie_by_cost_takes_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    row = {"growth": {"kind": "dynamic", "depth": 4, "width": 3, "node_budget": 10}, "draft_ms": 3.0}
    write_json(path, {"verify_ms": {"1": 10.0, "5": 14.0}, "growths": [row]})
    made = build(f"merge:trie(half,sure,budget=4,profile={path})", oracles(TEXTS), DynamicGrowth(10, 4, 3))
    assert isinstance(made, Merge)
    assert made.round_ms == pytest.approx((16.0, 17.0, 18.0, 19.0, 20.0))
    assert made.budget == 4
    given = build(f"merge:trie(half,ngram@chain:3,budget=4,profile={path},draft_ms=1)", oracles(TEXTS))
    assert isinstance(given, Merge)
    assert given.round_ms == pytest.approx((11.0, 12.0, 13.0, 14.0, 15.0))
    with pytest.raises(UserError, match="ngram@chain:3 costs: set draft_ms"):
        build(f"merge:trie(ngram@chain:3,half,profile={path})", oracles(TEXTS))
