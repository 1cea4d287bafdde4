"""Writes the outcomes of a census as a page."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from benchmarks.census.item import Outcome, Verdict

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_WITH_PROBLEM = ("with inputs", "silent", "wrong", "crashed", "no package", "not built")
_HEAD = """# Census of layers

What `describe` and `profile` say of every model type of transformers, of every layer class of flash-linear-attention
and mamba_ssm, of packages, and of layers written small after their papers. Each is small and randomly initialized, and
runs on a CPU. `python -m benchmarks.census --page docs/census.md` writes this page.
"""
_LEGEND = """
*fully*: every mixer is measured. *partly*: some are, the others have a reason. *skipped*: none is, all have a reason.
*no mixer*: no module mixes tokens, and none is listed. *with inputs*: a mixer is listed by `describe(model, *inputs)`
and by the first sample of a run alone. *silent*: by neither. *wrong*: what is listed treats every token by itself.
*crashed*: `describe` or `profile` raised. *not run*: nothing is listed, and there is no forward pass to tell.
*no package*: it cannot be built without a package that is not installed. *not built*: the library's own code failed on
its default configuration, made small.
Where there was no forward pass (in italics below), the list of `describe` alone is known.
"""


def page(outcomes: Iterable[Outcome], versions: Iterable[str], *, missing: Mapping[str, Sequence[str]]) -> str:
    """Return the page; `missing` names the items of each source that have no outcome yet."""
    by_source: defaultdict[str, list[Outcome]] = defaultdict(list)
    seconds = 0.0
    for outcome in outcomes:
        seconds += outcome.seconds
        by_source[outcome.source].append(outcome)
    made = f"{', '.join(versions)}; {seconds / 60:.0f} minutes of processor time"
    if count := sum(map(len, missing.values())):  # so that the time of all is not known
        made = f"{', '.join(versions)}. Items not made yet: {count}; the same command goes on with them"
    lines = [_HEAD, f"{made}.", "", *_counts(by_source)]
    for source in dict.fromkeys((*by_source, *missing)):
        members = sorted(by_source[source], key=lambda outcome: outcome.name)
        lines += ["", f"## {source[0].upper()}{source[1:]}", ""]
        for verdict in _VERDICTS:
            chosen = [o for o in members if o.verdict == verdict]
            if chosen:
                lines += [f"**{verdict}** ({len(chosen)}): {', '.join(_name(o) for o in chosen)}", ""]
        if names := missing.get(source):
            lines += [f"**not made yet** ({len(names)}): {', '.join(names)}", ""]
    return "\n".join((*lines, "", *_reasons(by_source)))


def _counts(by_source: dict[str, list[Outcome]]) -> list[str]:
    lines = [f"| source | {' | '.join(_VERDICTS)} | run |", f"|---|{'---|' * (len(_VERDICTS) + 1)}"]
    for source, members in by_source.items():
        counts = Counter(o.verdict for o in members)
        cells = [str(counts[verdict]) for verdict in _VERDICTS]
        lines.append(f"| {source} | {' | '.join(cells)} | {sum(o.ran for o in members)} of {len(members)} |")
    return [*lines, _LEGEND]


def _name(outcome: Outcome) -> str:
    problem = outcome.problem if outcome.verdict in _WITH_PROBLEM else ""
    has_list = outcome.verdict not in ("not run", "no package", "not built")
    shown = f"*{outcome.name}*" if has_list and not outcome.ran else outcome.name
    return f"{shown} ({problem})" if problem else shown


def _reasons(by_source: dict[str, list[Outcome]]) -> list[str]:
    """Return the reasons, most frequent first, with the classes that have them."""
    classes: defaultdict[str, set[str]] = defaultdict(set)
    for members in by_source.values():
        for outcome in members:
            for cls, reason in outcome.reasons.items():
                classes[_kind(reason, cls)].add(cls)
    lines = ["## Reasons", "", "| reason | classes | for example |", "|---|---|---|"]
    for kind, members in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {kind} | {len(members)} | {', '.join(f'`{cls}`' for cls in sorted(members)[:3])} |")
    return lines


def _kind(reason: str, cls: str) -> str:
    """Return a reason without its class, its numbers and its remedy."""
    text = re.sub(r"\d+(\.\d+)*", "N", reason.replace(cls, "it").partition(";")[0].splitlines()[0])
    return text.replace("|", "\\|")[:160]
