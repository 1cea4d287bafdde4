"""Defines the base class of all settings, and says in words what is wrong with one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from ess_monitor.errors import ConfigError
from ess_monitor.validation import has_long_integer, shown

_MAX_PROBLEMS = 10
_MAX_NAME = 200
_SUBJECT = re.compile(r"^\w+ should ")
_DETAIL = re.compile(r", unable to parse .*| after validation")
"""What only repeats that the value does not fit."""
_MESSAGES = {
    "missing": "must be given",
    "model_type": "must be a mapping of settings",
    "tuple_type": "must be a list: put it into brackets, [...]",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}
"""pydantic's type of a problem -> what is said of it, where its own message speaks of Python's types."""


@contextmanager
def _explained(model: type[BaseModel], given: object = None) -> Iterator[None]:
    if isinstance(given, Mapping) and not getattr(model, "takes_long_integers", False):
        refuse_long_integers(given)
    try:
        yield
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


if TYPE_CHECKING:  # editors and type checkers complete the settings from pydantic's own class
    from pydantic._internal._model_construction import ModelMetaclass as _SettingsType
    from typing_extensions import Self
else:

    class _SettingsType(type(BaseModel)):
        """Makes settings from keyword arguments; what pydantic refuses is a `ConfigError`.

        `__init__` would be called for settings inside of settings too, and their names would be lost.
        """

        def __call__(cls, *args: Any, **settings: Any) -> Any:
            if args:
                name = cls.__name__
                raise ConfigError(f"{name} takes its settings by name: {name}(name=value), or {name}(**mapping)")
            with _explained(cls, settings):
                return super().__call__(**settings)


class Settings(BaseModel, metaclass=_SettingsType):
    """Base class of all settings: frozen, and unknown names are errors.

    Raises:
        ConfigError: a setting is unknown or has a value it cannot have. It names the setting, what is allowed, and the
            value unless it may hold a secret.

    Examples:
        >>> class Example(Settings):
        ...     samples: int = 4
        >>> Example(sample=2)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: sample: unknown setting; did you mean samples?
    """

    # pydantic's own errors, those of an assignment, show no value: it may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    holds_secrets: ClassVar[bool] = False
    """Whether errors of these settings show no values."""
    takes_long_integers: ClassVar[bool] = False
    """Whether a whole number may have more than 64 bits."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what differs from the defaults."""
        fields = type(self).model_fields
        return (each for each in super().__repr_args__() if each[0] not in fields or each[1] != fields[each[0]].default)

    def __str__(self) -> str:
        return repr(self)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return settings from a mapping or a short form.

        Raises:
            ConfigError: as the class itself.
        """
        with _explained(cls, obj):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Return settings from JSON.

        Raises:
            ConfigError: as the class itself, or the text is not JSON.
        """
        with _explained(cls):
            return super().model_validate_json(json_data, **options)


def refuse_long_integers(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a whole number of more than 64 bits is somewhere in the settings.

    pydantic writes a number out to say what is wrong with it, and Python refuses to write thousands of digits.
    """
    for name, value in settings.items():
        if has_long_integer((name, value)):
            raise ConfigError(f"{name!s:.{_MAX_NAME}}: a whole number of more than 64 bits; no setting needs one")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong in words, the first of many problems: setting, problem, the value that was given.

    Args:
        error: raised by `model`.
        model: the outermost settings; names are searched in the whole of them.
    """
    found: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    problems = error.errors(include_url=False)
    for problem in problems[:_MAX_PROBLEMS]:
        location, kind = problem["loc"], problem["type"]
        unknown = kind == "extra_forbidden"
        path, types = _locate(model, location[:-1] if unknown else location)
        path = [*path, str(location[-1])] if unknown else path
        name = ".".join(path)[:_MAX_NAME]
        message = _unknown(model, path, types) if unknown else _message(kind, problem["msg"])
        if message not in found.setdefault(name, []):
            found[name].append(message)
        told = unknown or kind in ("missing", "value_error", "json_invalid") or _may_be_secret(model, location)
        values.setdefault(name, "" if told else f" (got {shown(problem['input'])})")
    lines = [f"{name}: {_joined(messages)}{values[name]}".removeprefix(": ") for name, messages in found.items()]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return "; ".join(lines)


def did_you_mean(model: type[BaseModel], name: str) -> str:
    """Return the setting whose name is like `name`, wherever it is in the settings; empty where none is.

    Examples:
        >>> from ess_monitor.interventions import AutopilotConfig
        >>> [did_you_mean(AutopilotConfig, name) for name in ("lag_step", "harm_ratio", "nothing")]
        ['lag_steps', 'probation.harm_ratio', '']
    """
    return _similar(model, name, [], [model])


def _similar(model: type[BaseModel], name: str, inside: list[str], types: list[Any]) -> str:
    """Return a setting that is called `name` in another place, else one that is called so beside it or anywhere."""
    name = name[:_MAX_NAME]
    spellings: dict[str, str] = {}
    for path, text in sorted(_paths(model), key=lambda item: len(item[0])):
        for spelling in (path[-1], ".".join(path), "_".join(path)):
            spellings.setdefault(spelling, text)
    if name in spellings:
        return spellings[name]
    beside = [field for each in _models(types) for field in each.model_fields]
    if close := get_close_matches(name, beside, 1, 0.75):
        return ".".join([*inside, *close])
    close = get_close_matches(name, spellings, 1, 0.8)
    return spellings[close[0]] if close else ""


def _unknown(model: type[BaseModel], path: list[str], types: list[Any]) -> str:
    *inside, name = path
    meant = _similar(model, name, inside, types)
    if not meant:
        classes = " or ".join(each.__name__ for each in _models(types)) or model.__name__
        return f"unknown setting; see {classes} for the names"
    if meant == name and "." in name:
        outer, _, inner = name.partition(".")
        return f'unknown setting; nest it: {{"{outer}": {{"{inner}": ...}}}}'
    return f"unknown setting; did you mean {meant}{' at the top level' if meant == name else ''}?"


def _message(kind: str, message: str) -> str:
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return _MESSAGES.get(kind) or _DETAIL.sub("", _SUBJECT.sub("must ", message))


def _joined(messages: list[str]) -> str:
    """Join what the members of a union say: "must be 'midpoint' or 'all', or a valid integer"."""
    if all(message.startswith("must be ") for message in messages):
        return "must be " + ", or ".join(message.removeprefix("must be ") for message in messages)
    return "; ".join(messages)


def _may_be_secret(model: type[BaseModel], location: tuple[int | str, ...]) -> bool:
    """Return whether a setting holds credentials, or an address, which can have a password in it."""
    named = any(isinstance(part, str) and ("auth" in part or part.endswith("url")) for part in location)
    # The whole of an exporter's settings, when no part of it could be blamed.
    whole = location[:1] == ("exporters",) and len(location) <= 3
    return named or whole or getattr(model, "holds_secrets", False)


def _locate(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[Any]]:
    """Return the names on the way to a setting and its types, without pydantic's names for the members of a union."""
    path, types = [], [model]
    for part in location:
        fields = [each.model_fields[part] for each in _models(types) if part in each.model_fields]
        items = [
            get_args(each)
            for each in types
            if get_origin(each) in ((list, tuple) if isinstance(part, int) else (dict,))
        ]
        if fields:
            types = [member for field in fields for member in _members(field.annotation)]
        elif items:
            types = _members(items[0][0] if isinstance(part, int) else items[0][1])
        else:
            types = [each for each in _models(types) if _kind(each) == part] or types
            continue
        path.append(str(part))
    return path, types


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (list, tuple, dict) or not get_args(annotation):
        return [annotation]
    return [member for each in get_args(annotation) for member in _members(each)]


def _models(types: list[Any]) -> list[type[BaseModel]]:
    return [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]


def _kind(model: type[BaseModel]) -> Any:
    """Return by which `kind` these settings are told from others."""
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _paths(model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every setting: the names on the way to it, and how that is written."""
    for name, field in model.model_fields.items():
        yield (name,), name
        for member in _members(field.annotation):
            for inner in _models([member]):
                for path, text in _paths(inner):
                    yield (name, *path), f"{name}.{text}"
            if get_origin(member) is tuple:
                for inner in _models(_members(get_args(member)[0])):
                    for path, _ in _paths(inner):
                        text = f'{{"kind": "{_kind(inner)}", "{".".join(path)}": ...}} in {name}'
                        yield (name, *path), text
