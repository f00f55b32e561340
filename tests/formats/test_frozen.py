"""@frozen makes what dataclass(frozen=True) makes: each test compares the two."""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gguf_run.formats.frozen import frozen

LIKE: Callable[..., Any] = dataclasses.dataclass(frozen=True)


def body(decorate: Callable[..., Any]) -> Any:
    class Point:
        x: int
        y: float = 0.5
        names: list[str] = dataclasses.field(default_factory=list, compare=False)
        secret: str = dataclasses.field(default="s", repr=False, kw_only=True)

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("x is negative")

    return decorate(Point)


OURS, THEIRS = body(frozen), body(LIKE)


@frozen
class Sum:
    """Is pickled."""

    a: int
    b: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("values", "named"),
    [((1,), {}), ((1, 2.0), {"secret": "t"}), ((), {"y": 3.0, "x": 2, "names": ["n"]}), ((1, 2.0, ["a"]), {})],
)
def test_fields_repr_and_replace(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, theirs = OURS(*values, **named), THEIRS(*values, **named)
    assert vars(ours) == vars(theirs)
    assert repr(ours) == repr(theirs)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert vars(dataclasses.replace(ours, y=9.0)) == vars(dataclasses.replace(theirs, y=9.0))


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1, 2.0, [], "s"), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((), {"y": 1.0}), ((1, 2, 3, 4, 5), {})],
)
def test_wrong_arguments(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    for cls in (OURS, THEIRS):
        with pytest.raises(TypeError, match="Point"):
            cls(*values, **named)


def test_each_instance_has_a_list_of_its_own() -> None:
    assert OURS(1).names is not OURS(1).names


def test_equality_and_hash() -> None:
    for cls in (OURS, THEIRS):
        assert cls(1, names=["a"]) == cls(1)  # compare=False
        assert cls(1) != cls(2)
        assert cls(1) != (1, 0.5, "s")
        assert hash(cls(1)) == hash(cls(1))
    assert OURS(1) != THEIRS(1)
    alone = body(lambda cls: frozen(eq=False)(cls))
    assert alone(1) != alone(1)
    assert len({alone(1), alone(1)}) == 2


def test_nothing_changes() -> None:
    point = OURS(1)
    for change in (lambda: setattr(point, "x", 2), lambda: setattr(point, "new", 2), lambda: delattr(point, "x")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    assert point.x == 1


def test_checks_run() -> None:
    with pytest.raises(ValueError, match="negative"):
        OURS(-1)
    with pytest.raises(ValueError, match="negative"):
        dataclasses.replace(OURS(1), x=-1)


def test_arrays_are_no_trouble() -> None:
    assert OURS(1, names=np.zeros(3)).names.shape == (3,)


def test_pickle() -> None:
    assert pickle.loads(pickle.dumps(Sum(1, (2,)))) == Sum(1, (2,))


@pytest.mark.parametrize("base", [frozen, LIKE])
@pytest.mark.parametrize("derived", [frozen, LIKE])
def test_subclasses(base: Callable[..., Any], derived: Callable[..., Any]) -> None:
    @base
    class Parent:
        a: int
        b: tuple[int, ...] = ()

    @derived
    class Child(Parent):
        c: int = 3

    assert Child(1, c=4) == Child(1, (), 4)
    assert Child(1) != Parent(1)
    assert hash(Child(1)) == hash(Child(1))
    assert repr(Child(1)).endswith("Child(a=1, b=(), c=3)")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Child(1).c = 2
