"""Whatever is given to a public callable, it works or says in an error of ours what was wrong with which argument."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
from pydantic import ValidationError

from ess_monitor.errors import EssMonitorError
from ess_monitor.validation.settings import Settings
from tests.honesty import of_the_metric, of_the_model, of_the_run
from tests.honesty.case import Case
from tests.honesty.exempt import EXEMPT
from tests.honesty.wrong import wrong_values

REGISTRY: dict[str, dict[str, Case]] = {
    "ess_monitor": {
        **of_the_model.PACKAGE,
        **{name: of_the_run.REPORT[name] for name in ("figures_of", "load_run")},
    },
    "ess_monitor.alerts": of_the_run.ALERTS,
    "ess_monitor.analysis": of_the_model.ANALYSIS,
    "ess_monitor.capture": of_the_model.CAPTURE,
    "ess_monitor.diagnosis": of_the_model.DIAGNOSIS,
    "ess_monitor.distributed": of_the_model.DISTRIBUTED,
    "ess_monitor.ess": of_the_metric.ESS,
    "ess_monitor.exporters": of_the_run.EXPORTERS,
    "ess_monitor.featurizers": of_the_metric.FEATURIZERS,
    "ess_monitor.interventions": of_the_model.INTERVENTIONS,
    "ess_monitor.report": of_the_run.REPORT,
    "ess_monitor.runtime": of_the_model.RUNTIME,
    "ess_monitor.tasks": of_the_metric.TASKS,
    **{f"ess_monitor.integrations.{name}": cases for name, cases in of_the_run.INTEGRATIONS.items()},
}
CASES = [pytest.param(room, name, id=f"{room}.{name}") for room, cases in REGISTRY.items() for name in cases]
CALLED_BY_USERS = ("Monitor", "MonitorConfig", "LayerFilter", "Tracker", "Operator", "DeltaRecurrence", "SyntheticTask")
"""Classes whose methods take arguments of users, besides the modules' `forward`."""


def names_of(room: str) -> list[str]:
    """What a room exports; the callback alone of an integration, whose module is imported by name."""
    return list(getattr(importlib.import_module(room), "__all__", ["ESSMonitorCallback"]))


def public(room: str, name: str) -> Any:
    return reduce(getattr, name.split("."), importlib.import_module(room))


def arguments_of(case: Case, function: Any) -> Iterator[str]:
    """What the case gives, and what has a default."""
    given = case.arguments()
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin
        parameters = {}.values()  # type: ignore[assignment]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [each.name for each in parameters if each.kind not in several and each.name != "self"]
    return (name for name in dict.fromkeys([*given, *named]) if name not in case.exempt)


def problems(case: Case, function: Any) -> Iterator[str]:
    """What is wrong with the errors of one callable."""
    is_settings = isinstance(function, type) and issubclass(function, Settings)
    of_records = EssMonitorError if is_settings else ValidationError  # records are made by the monitor alone
    for argument in arguments_of(case, function):
        allowed = case.allowed.get(argument, (ZeroDivisionError, ""))[0]
        called = case.named.get(argument, argument)
        for label, value in wrong_values(case.arguments().get(argument)):
            try:
                case.call(**{**case.arguments(), argument: value})
            except (EssMonitorError, of_records) as error:
                if not re.search(rf"\b({called})\b", str(error)) or len(str(error)) < 20:
                    yield f"{argument}, {label}: {type(error).__name__} does not name it: {error!s:.200}"
            except Exception as error:
                if allowed is ZeroDivisionError or not isinstance(error, allowed):
                    yield f"{argument}, {label}: {type(error).__name__}: {error!s:.150}"


@pytest.mark.parametrize(("room", "name"), CASES)
def test_a_valid_call_succeeds(room: str, name: str) -> None:
    case = REGISTRY[room][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.call(**case.arguments())


@pytest.mark.parametrize(("room", "name"), CASES)
def test_a_wrong_argument_works_or_is_named_in_an_error_of_ours(room: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(problems(REGISTRY[room][name], public(room, name))) == []


@pytest.mark.parametrize("room", REGISTRY)
def test_every_public_name_is_called_or_exempt_with_a_reason(room: str) -> None:
    missing = {name for name in names_of(room) if f"{room}.{name}" not in EXEMPT} - REGISTRY[room].keys()
    assert not missing, f"give each of {sorted(missing)} a valid call in tests/honesty, or a reason in exempt.py"


def test_every_method_that_users_call_is_called() -> None:
    called = {name for cases in REGISTRY.values() for name in cases}
    missing = []
    for room in REGISTRY:
        for name in names_of(room):
            cls = public(room, name)
            for method in methods_with_arguments(cls) if inspect.isclass(cls) else ():
                if (name in CALLED_BY_USERS or method == "forward") and f"{name}.{method}" not in called:
                    missing.append(f"{room}.{name}.{method}")
    assert [name for name in missing if not is_inherited(name)] == []


def methods_with_arguments(cls: type) -> list[str]:
    functions = {
        name: member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        for base in cls.__mro__
        if base.__module__.startswith("ess_monitor")
        for name, member in vars(base).items()
        if not name.startswith("_")
    }
    return [
        name
        for name, member in functions.items()
        if inspect.isfunction(member) and len(inspect.signature(member).parameters) > 1
    ]


def is_inherited(name: str) -> bool:
    """An operator's method is called as that of `Operator`, those of settings by tests/test_settings.py."""
    method = name.rpartition(".")[2]
    return method in vars(Settings) or (f"Operator.{method}" in of_the_metric.ESS and ".ess." in name)


def test_what_is_exempt_is_public_and_not_called() -> None:
    for name in EXEMPT:
        room, _, public_name = name.rpartition(".")
        assert public_name in names_of(room)
        assert public_name not in REGISTRY[room]


def _careless(width: Any, loud: Any = False) -> Any:
    if width is None:
        raise EssMonitorError("that was wrong, but nobody learns with what")
    return "-" * width if loud is False else width / 2


def test_errors_that_are_not_ours_or_name_nothing_are_found() -> None:
    found = "\n".join(problems(Case(_careless, lambda: {"width": 3}), _careless))
    assert "width, None: EssMonitorError does not name it" in found
    assert "width, text: TypeError" in found
    assert "width, one and a half: TypeError" in found
    assert "width, minus one" not in found
    assert "loud, True" not in found
