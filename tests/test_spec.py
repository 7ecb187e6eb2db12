"""SketchSpec: frozen, fingerprinted, read back from JSON, and refusing what it cannot mean."""

import dataclasses
import json

import pytest

from gradsift.kernels.errors import GradsiftError, SpecError
from gradsift.kernels.spec import SketchSpec

LAYOUT = (("a.weight", (2, 3)), ("b.weight", (4,)))


def test_defaults() -> None:
    spec = SketchSpec()
    assert (spec.dim, spec.seed, spec.kind, spec.version) == (4096, 0, "segment", 1)


def test_is_frozen_and_hashable() -> None:
    spec = SketchSpec(dim=128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.dim = 256  # type: ignore[misc]
    assert {spec: 1}[SketchSpec(dim=128)] == 1


def test_fingerprint_is_fixed_for_version_1() -> None:
    assert SketchSpec().fingerprint == "1acb5faa6e530108"


def test_fingerprint_changes_with_every_field() -> None:
    specs = [
        SketchSpec(),
        SketchSpec(dim=64),
        SketchSpec(seed=1),
        SketchSpec(kind="identity"),
        SketchSpec(kind="identity").bind(LAYOUT),
        SketchSpec(kind="identity").bind(LAYOUT[:1]),
    ]
    assert len({spec.fingerprint for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    "spec",
    [
        SketchSpec(),
        SketchSpec(dim=64, seed=(1 << 64) - 1),
        SketchSpec(kind="identity"),
        SketchSpec(kind="identity").bind(LAYOUT),
    ],
)
def test_json_round_trip(spec: SketchSpec) -> None:
    again = SketchSpec.from_json(spec.to_json())
    assert again == spec
    assert again.fingerprint == spec.fingerprint
    assert SketchSpec.from_json(json.dumps(json.loads(spec.to_json()), indent=2)) == spec


def test_bind_fills_the_identity_only() -> None:
    assert SketchSpec().bind(LAYOUT) == SketchSpec()
    bound = SketchSpec(kind="identity").bind(LAYOUT)
    assert (bound.dim, bound.layout) == (10, LAYOUT)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": 0}, "dim is 0, expected a multiple of 64"),
        ({"dim": -64}, "dim is -64"),
        ({"dim": 100}, "dim is 100, expected a multiple of 64"),
        ({"dim": 1 << 25}, "expected a multiple of 64 between 64 and 16777216"),
        ({"dim": 64.0}, "dim is 64.0, expected an integer"),
        ({"dim": True}, "dim is True"),
        ({"seed": -1}, r"seed is -1, expected an integer in \[0, 2\*\*64\)"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
        ({"seed": "0"}, "seed is '0'"),
        ({"kind": "gaussian"}, "sketch kind is 'gaussian', expected one of 'segment', 'identity'"),
        ({"version": 2}, "sketch version is 2 but this gradsift draws version 1: install the release"),
        ({"layout": LAYOUT}, "layout is for kind='identity' only"),
        ({"kind": "identity", "dim": 11, "layout": LAYOUT}, "dim is 11 but .* hold 10 numbers"),
        ({"kind": "identity", "dim": 0}, "leave it out for kind='identity'"),
    ],
)
def test_refuses_in_a_sentence(fields: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        SketchSpec(**fields)  # type: ignore[arg-type]
    assert isinstance(caught.value, (ValueError, GradsiftError))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is a JSON list, expected an object"),
        ("{}", r"lacks \['dim', 'kind', 'seed', 'version'\]"),
        ('{"dim":64,"seed":0,"kind":"segment","version":1,"color":2}', r"unknown fields \['color'\]"),
        ('{"dim":64,"seed":0,"kind":"segment","version":9}', "version is 9"),
        ('{"dim":64,"seed":0,"kind":"identity","version":1,"layout":3}', "must be a list"),
        ('{"dim":64,"seed":0,"kind":"identity","version":1,"layout":[3]}', "must be a list"),
        ('{"dim":64,"seed":0,"kind":"identity","version":1,"layout":[["a",["x"]]]}', "must be a list"),
    ],
)
def test_refuses_other_json(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        SketchSpec.from_json(text)
