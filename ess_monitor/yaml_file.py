"""A YAML file of settings, read within limits: a file from a stranger costs little and runs nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ess_monitor.errors import ConfigError

MAX_BYTES = 100_000
"""Size of a file. A configuration is a few lines, and the parser takes microseconds for every character."""
MAX_DEPTH = 16
"""Lists and mappings inside each other; the deepest setting lies 4 deep. The loader recurses: there must be an end."""
MAX_NODES = 10_000
"""Values, lists and mappings, an alias counting as all that it stands for: nine lines of aliases can mean a billion."""
MAX_INTEGER = 2**63 - 1
"""Longer ones take time that grows with the square of their digits to be written out, as every message would."""

_UNWRITABLE = re.compile("[\\0\ud800-\udfff]")
"""What an escape can bring in and nothing can take: NUL ends a path, half a surrogate pair has no encoding."""


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings in a file; none where it is empty.

    Plain values, lists and mappings only: a tag that would make an object is refused (`yaml.SafeLoader`).

    Raises:
        ConfigError: the file cannot be read, is too large, too deep or no YAML, or holds something else than a mapping
            of names. The message says where, and quotes no line, as the file may be another one, with secrets in it.
    """
    try:
        with path.open("rb") as file:  # a size asked for beforehand says nothing of a pipe or a device
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"path: cannot read {path}: {error.strerror}; give the path of a YAML file") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"path: {path} is larger than {MAX_BYTES} bytes; a configuration is a few lines")
    try:
        text = raw.decode("utf-8")
        _check_size(text)
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"path: {path} is not YAML of settings: {_explain(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"path: {path} is not YAML: byte {error.start} is not UTF-8") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"path: {path} holds a {type(content).__name__}; it must be a mapping of settings")
    others = [name for name in content if not isinstance(name, str)]
    if others:
        raise ConfigError(f"path: {path} has a {type(others[0]).__name__} as the name of a setting; names are text")
    return content


class _TooMuch(yaml.MarkedYAMLError):
    """The text means more than a configuration does."""

    def __init__(self, problem: str, found: yaml.Node | yaml.Event) -> None:
        super().__init__(problem=problem, problem_mark=found.start_mark)  # type: ignore[arg-type]


class _Loader(yaml.SafeLoader):
    """The safe loader, whose scalars fail with its own kind of error, and whose numbers have an end."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]  # what the value's own type makes of it: `2001-13-01`, `!!int x`
            raise yaml.constructor.ConstructorError(None, None, f"this is no {kind}", node.start_mark) from error
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise _TooMuch("a whole number of more than 64 bits", node)
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise _TooMuch("a character that no file or name can hold", node)
        return value


def _check_size(text: str) -> None:
    """Walk the parser's events, which take no recursion and build nothing, before anything is built.

    Raises:
        yaml.YAMLError: no YAML, too deep, or more than `MAX_NODES` with all aliases written out.
    """
    total = 0
    anchored: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and what had been counted when the node began
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise _TooMuch("an alias inside of what it stands for", event)
            total += anchored.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                anchored[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
            if len(open_nodes) > MAX_DEPTH:
                raise _TooMuch(f"more than {MAX_DEPTH} levels", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                anchored[anchor] = total - before
        if total > MAX_NODES:
            raise _TooMuch(f"more than {MAX_NODES} values, aliases written out", event)


def _explain(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem!s:.100}, in line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character is not allowed, at position {error.position}"
    return type(error).__name__
