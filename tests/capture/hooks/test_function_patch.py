"""Standing in for a global name, and leaving no trace."""

from __future__ import annotations

from typing import Any

from ess_monitor.capture.hooks.function_patch import add_listener


def namespace() -> dict[str, Any]:
    def double(x: int) -> int:
        return 2 * x

    return {"double": double}


class Seen(list[int]):
    """A listener that writes down what was passed, and passes it on."""

    def __call__(self, original: Any, proceed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.append(args[0])
        return proceed(args, kwargs)


def test_a_listener_sees_the_calls_and_the_original_object_is_back_afterwards() -> None:
    space, seen = namespace(), Seen()
    before = dict(space)
    remove = add_listener(space, "double", seen)
    assert space["double"](3) == 6
    assert seen == [3]
    remove()
    assert space == before
    assert space["double"] is before["double"]
    assert space["double"](4) == 8
    assert seen == [3]


def test_the_stand_in_looks_like_the_function_it_stands_for() -> None:
    space = namespace()
    name = space["double"].__name__
    remove = add_listener(space, "double", Seen())
    assert space["double"].__name__ == name
    remove()


def test_several_listeners_may_come_and_go_in_any_order() -> None:
    space, first, second = namespace(), Seen(), Seen()
    original = space["double"]
    remove_first = add_listener(space, "double", first)
    remove_second = add_listener(space, "double", second)
    assert space["double"](1) == 2
    remove_first()
    assert space["double"](2) == 4
    assert (first, second) == ([1], [1, 2])
    remove_second()
    assert space["double"] is original
    remove_second()
    remove_first()
    assert space["double"] is original


def test_a_function_that_somebody_else_put_over_ours_stays_and_still_works() -> None:
    space, seen = namespace(), Seen()
    remove = add_listener(space, "double", seen)
    ours = space["double"]
    space["double"] = lambda x: ours(x) + 1
    theirs = space["double"]
    remove()
    assert space["double"] is theirs
    assert theirs(5) == 11
    assert seen == []


def test_a_listener_may_change_the_arguments_for_those_behind_it() -> None:
    space, seen = namespace(), Seen()
    remove_change = add_listener(space, "double", lambda original, proceed, args, kwargs: proceed((10,), kwargs))
    remove_seen = add_listener(space, "double", seen)
    assert space["double"](1) == 20
    assert seen == [10]
    remove_change()
    remove_seen()
