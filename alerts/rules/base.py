"""Recording and alerting rules as values, and how they are written down."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

PREFIX = "EssMonitor"

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class Record:
    """A recording rule, named `level:metric:operation`; the level says which target labels are left."""

    name: str
    expr: str
    why: str
    """Becomes the comment above the rule."""

    def as_yaml(self) -> dict[str, Any]:
        """The rule in Prometheus' format."""
        return {"record": self.name, "expr": clean(self.expr)}


@dataclass(frozen=True)
class Alert:
    """An alerting rule."""

    name: str
    """Without the prefix."""
    expr: str
    severity: Severity
    summary: str
    """One line, a Go template."""
    description: str
    """What was seen and the first thing to do, a Go template."""
    why: str
    """Becomes the comment above the rule."""
    runbook_url: str
    for_seconds: int = 0
    keep_firing_for_seconds: int = 0

    def as_yaml(self) -> dict[str, Any]:
        """The rule in Prometheus' format."""
        rule: dict[str, Any] = {"alert": PREFIX + self.name, "expr": clean(self.expr)}
        if self.for_seconds:
            rule["for"] = duration(self.for_seconds)
        if self.keep_firing_for_seconds:
            rule["keep_firing_for"] = duration(self.keep_firing_for_seconds)
        rule["labels"] = {"severity": self.severity}
        rule["annotations"] = {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": self.runbook_url,
        }
        return rule


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after the other, at one moment: what an alert reads is recorded in its own group."""

    name: str
    rules: tuple[Record | Alert, ...]


def duration(seconds: int) -> str:
    """Prometheus' notation, in the largest units that fit.

    >>> duration(600), duration(5400), duration(3661), duration(0)
    ('10m', '1h30m', '1h1m1s', '0s')
    """
    parts = ((seconds // 3600, "h"), (seconds % 3600 // 60, "m"), (seconds % 60, "s"))
    return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"


def percent(ratio: float) -> str:
    """A ratio for a reader.

    >>> percent(0.05), percent(0.125)
    ('5 %', '12.5 %')
    """
    return f"{100 * ratio:g} %"


def clean(text: str) -> str:
    """Without the indentation of the Python source."""
    return textwrap.dedent(text).strip()


def written(groups: Sequence[Group], heading: str) -> str:
    """The groups as a rule file, with a comment above every rule."""
    lines = [_comment(heading), "groups:"]
    for group in groups:
        lines += [f"  - name: {group.name}", "    rules:"]
        for rule in group.rules:
            lines.append(textwrap.indent(_comment(rule.why), 6 * " "))
            lines.append(textwrap.indent(dump([rule.as_yaml()]).rstrip(), 6 * " "))
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def dump(content: Any) -> str:
    """YAML as a person would write it: keys in their order, long text folded, several lines kept."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in textwrap.wrap(clean(text), 104))


class _Dumper(yaml.SafeDumper):
    """Sequences are indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else ">" if len(value) > 90 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
