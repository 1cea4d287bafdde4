"""Recording and alerting rules as values, and how they are written as YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import yaml

PREFIX = "EssMonitor"

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class RecordingRule:
    """A recording rule, named `level:metric:operation`; the level says which target labels are left."""

    name: str
    expr: str
    why: str
    """Becomes the comment above the rule."""

    def as_yaml(self) -> dict[str, Any]:
        """Return the rule in Prometheus' format."""
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True)
class Alert:
    """An alerting rule."""

    name: str
    """Without the prefix."""
    severity: Severity
    expr: str
    summary: str
    """One line, a Go template."""
    description: str
    """What was seen and the first thing to do, a Go template."""
    why: str
    """Becomes the comment above the rule."""
    for_seconds: int = 0
    keep_firing_for_seconds: int = 0
    runbook_url: str = ""

    def as_yaml(self) -> dict[str, Any]:
        """Return the rule in Prometheus' format."""
        waits = {"for": self.for_seconds, "keep_firing_for": self.keep_firing_for_seconds}
        return {
            "alert": PREFIX + self.name,
            "expr": self.expr,
            **{key: duration(seconds) for key, seconds in waits.items() if seconds},
            "labels": {"severity": self.severity},
            "annotations": self.annotations(),
        }

    def annotations(self) -> dict[str, str]:
        """Return the texts of the alert."""
        return {"summary": self.summary, "description": self.description, "runbook_url": self.runbook_url}


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated in order at one moment: an alert's recording rules are in its own group."""

    name: str
    rules: tuple[RecordingRule | Alert, ...]


def duration(seconds: int) -> str:
    """Return seconds in Prometheus' notation, in the largest units that fit.

    >>> duration(600), duration(5400), duration(3661), duration(0)
    ('10m', '1h30m', '1h1m1s', '0s')
    """
    parts = ((seconds // 3600, "h"), (seconds % 3600 // 60, "m"), (seconds % 60, "s"))
    return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"


def percent(ratio: float) -> str:
    """Return a ratio as a reader sees it.

    >>> percent(0.05), percent(0.125)
    ('5 %', '12.5 %')
    """
    return f"{100 * ratio:g} %"


def dump(content: Any) -> str:
    """Return readable YAML: keys in their order, long text folded, line breaks kept."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Indents sequences below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else ">" if len(value) > 90 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
