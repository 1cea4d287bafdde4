"""What a run's story means, in sentences a person can act on. Plain text: the page cleans and escapes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ess_monitor.records import Action, Condition, Finding, Status
from ess_monitor.report.history import RunHistory

_ILL: tuple[Condition, ...] = ("collapsed", "saturated")

_STATUS_ADVICE: dict[Status, str] = {
    "nonfinite": "NaN or infinity in the layer's tensors: look at the loss and the learning rate around those steps.",
    "too_short": "the sequences have no past to remember: give sequences of two tokens or more.",
    "timed_out": "lower capture.samples, capture.heads or positions, or raise runtime.timeout_seconds.",
    "dropped": "the queue was full: harmless now and then, else raise every_n_steps.",
    "failed": "capture or computation raised an error; the last message was:",
}

_EVENTS_OF_A_LAYER = 12
"""The newest are told in words; all are in the page's table."""

_SHORT_SEQUENCE = 0.9
"""attainable size / TSS below which the sequences are named as what limits the reading."""


@dataclass(frozen=True)
class Paragraph:
    """What is said of one thing: a heading, what was seen, and what to do next."""

    heading: str
    condition: Condition
    """Decides the color of the mark; `unknown` for what is no condition of a layer."""
    seen: tuple[str, ...]
    advice: tuple[str, ...]


def layer_title(name: str) -> str:
    """What to call a layer: its name, and a word for the model that is itself the layer.

    >>> layer_title("blocks.0.mixer"), layer_title("")
    ('blocks.0.mixer', 'root')
    """
    return name or "root"


def headline(story: RunHistory) -> str:
    """The outcome in one or two sentences."""
    return " ".join(filter(None, [_verdict(story), _ending(story)]))


def paragraphs(story: RunHistory) -> tuple[Paragraph, ...]:
    """Every layer with a history, the worst first, then what limits how far the numbers can be trusted."""
    layers = [_layer(story, layer) for layer in story.layers if _has_history(story, layer)]
    layers.sort(key=lambda paragraph: _ILL.index(paragraph.condition) if paragraph.condition in _ILL else len(_ILL))
    return (*layers, *_caveats(story))


def named(names: Sequence[str], limit: int = 6) -> str:
    """Names in a row, the rest counted.

    >>> named(["a", "b", "c"]), named(["a", "b", "c"], limit=2)
    ('a, b and c', 'a, b and 1 more')
    """
    shown = [layer_title(name) for name in names[:limit]]
    if len(names) > limit:
        shown.append(f"{len(names) - limit} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"


def percent(ratio: float | None) -> str:
    """
    >>> percent(0.1875), percent(None)
    ('19 %', 'unknown')
    """
    return "unknown" if ratio is None else f"{ratio:.0%}".replace("%", " %")


def timeline(story: RunHistory) -> list[Finding | Action]:
    """Findings and actions by step; at one step the finding comes before the action that answers it."""
    events: list[Finding | Action] = [*story.findings, *story.actions]
    return sorted(events, key=lambda event: event.step)


def sentence(event: Finding | Action) -> str:
    """What changed and why, or what was done, how it ended, and what the utilization did."""
    return _finding_sentence(event) if isinstance(event, Finding) else _action_sentence(event)


def _finding_sentence(finding: Finding) -> str:
    return f"{finding.previous} → {finding.condition}: {finding.reason}"


def _action_sentence(action: Action) -> str:
    strength = "" if action.strength is None else f" at {action.strength:g}"
    sentence = f"{action.action}{strength}, {action.outcome.replace('_', ' ')}: {action.message}"
    if action.utilization_before is not None and action.utilization_after is not None:
        sentence += f" (utilization {percent(action.utilization_before)} → {percent(action.utilization_after)})"
    return sentence


def _verdict(story: RunHistory) -> str:
    total = len(story.layers)
    if not story.measurements:
        return "Nothing was measured: the run ended before its first sample, or no sample reached the log."
    sentences = []
    for condition in _ILL:
        ill = [layer for layer, value in story.conditions.items() if value == condition]
        if ill:
            sentences.append(f"{len(ill)} of {total} layers ended {condition}: {named(ill)}.")
    fallen = dict.fromkeys(finding.layer for finding in story.findings if finding.condition in _ILL)
    recovered = [layer for layer in fallen if story.conditions.get(layer) == "healthy"]
    if recovered:
        sentences.append(f"{len(recovered)} of {total} layers fell ill and recovered: {named(recovered)}.")
    if not sentences:
        judged = [layer for layer, value in story.conditions.items() if value != "unknown"]
        if not judged:
            return "No layer was judged: see below why."
        sentences.append(f"No layer collapsed or filled up; {len(judged)} of {total} were judged.")
    return " ".join(sentences)


def _ending(story: RunHistory) -> str:
    if story.final is None:
        return "The log has no end: the run was killed, or it is still going on."
    return "The run failed." if story.final.status == "failed" else ""


def _has_history(story: RunHistory, layer: str) -> bool:
    return (
        story.conditions[layer] in _ILL
        or any(action.layer == layer for action in story.actions)
        or any(finding.layer == layer and finding.condition in _ILL for finding in story.findings)
    )


def _layer(story: RunHistory, layer: str) -> Paragraph:
    condition = story.conditions[layer]
    events = [event for event in timeline(story) if event.layer == layer]
    seen = tuple(f"Step {event.step}: {sentence(event)}" for event in events[-_EVENTS_OF_A_LAYER:])
    return Paragraph(layer_title(layer), condition, seen, _advice(story, layer, condition))


def _advice(story: RunHistory, layer: str, condition: Condition) -> tuple[str, ...]:
    findings = [finding for finding in story.findings if finding.layer == layer and finding.condition in _ILL]
    outcomes = {action.outcome for action in story.actions if action.layer == layer}
    rule = findings[-1].advice if findings else ""
    advice = [_sentence(rule)] if rule and condition in _ILL else []
    if condition == "collapsed":
        if outcomes & {"applied", "failed", "rolled_back"}:
            advice.append(
                "The autopilot's treatment has not brought the layer back: look at features and data before you try a "
                "stronger one."
            )
        elif "dry_run" in outcomes:
            advice.append("The autopilot only advised. With autopilot.mode='auto' it would have acted.")
        elif not outcomes:
            advice.append(
                "No treatment was tried: the autopilot's modes 'advise' and 'auto' name one where one exists."
            )
    elif condition == "healthy" and findings:
        if "applied" in outcomes:
            advice.append(
                "Nothing for now. One run cannot tell whether the treatment or time brought the recovery: train the "
                "same seed without it and set both side by side with the command: ess-monitor compare RUN_A RUN_B."
            )
        else:
            advice.append(
                "Nothing for now: it recovered without a treatment. If that happens often, raise the warm-up."
            )
    elif condition == "unknown" and outcomes:
        advice.append("The layer is not judged at the end of the run: let it train on before you conclude anything.")
    return tuple(advice)


def _caveats(story: RunHistory) -> list[Paragraph]:
    caveats = [_not_judged(story), *_bad_readings(story), _short_sequences(story), _cost(story), _losses(story)]
    return [caveat for caveat in caveats if caveat is not None]


def _not_judged(story: RunHistory) -> Paragraph | None:
    layers = [layer for layer, condition in story.conditions.items() if condition == "unknown"]
    if not layers or not story.measurements:
        return None
    reasons = []
    for layer in layers:
        last = story.readings[layer][-1:]
        if story.layer(layer).uninformative:
            reasons.append(story.layer(layer).uninformative)
        elif story.layer(layer).capacity_grows or any(reading.capacity_grows for reading in last):
            reasons.append("its capacity grows with the position (softmax attention)")
        elif not story.ok(layer):
            reasons.append("it has no valid reading")
        elif layer == story.spared_layer and story.ok(layer)[-1].step >= story.warmup_steps:
            reasons.append(
                "it uses little of its memory, which may be right in the first of several layers (it often looks back "
                "one token only), so it is called neither healthy nor collapsed"
            )
        else:
            reasons.append("the warm-up was not over, or there were too few measurements")
    seen = [
        f"{named([layer for layer, why in zip(layers, reasons, strict=True) if why == reason])}: {_sentence(reason)}"
        for reason in dict.fromkeys(reasons)
    ]
    advice = ["Lower diagnosis.warmup_steps or train longer."] if any("warm-up" in reason for reason in reasons) else []
    return Paragraph("Layers that were not judged", "unknown", tuple(seen), tuple(advice))


def _bad_readings(story: RunHistory) -> list[Paragraph]:
    found = []
    for status, advice in _STATUS_ADVICE.items():
        bad = [r for readings in story.readings.values() for r in readings if r.status == status]
        if bad:
            counts = Counter(reading.layer for reading in bad)
            seen = f"{len(bad)} readings of {named(list(counts))}, the last at step {bad[-1].step}."
            message = f" {bad[-1].message}" if status == "failed" else ""
            found.append(
                Paragraph(f"Readings without a size: {status}", "unknown", (seen,), (_sentence(advice + message),))
            )
    return found


def _short_sequences(story: RunHistory) -> Paragraph | None:
    short = []
    for layer in story.layers:
        last = story.ok(layer)[-1:]
        for reading in last:
            capacity, attainable = reading.state_capacity, reading.attainable_size
            if capacity and attainable and not reading.capacity_grows and attainable < _SHORT_SEQUENCE * capacity:
                short.append(layer)
    if not short:
        return None
    return Paragraph(
        "Sequences too short to fill the memory",
        "unknown",
        (
            f"{named(short)}: at the measured positions the sequence allows fewer dimensions than the layer has, so a "
            "low utilization is in part the sequence's. The conditions take that into account; the heat map does not.",
        ),
        ("Measure on longer sequences where the task allows it.",),
    )


def _cost(story: RunHistory) -> Paragraph | None:
    budget = story.info.overhead_budget_ratio
    cost = story.measurements[-1].overhead_ratio if story.measurements else 0.0
    if not budget or cost <= 1.5 * budget:
        return None
    return Paragraph(
        "The monitor cost more than its budget",
        "unknown",
        (f"It took {cost:.2%} of the training time; the budget was {budget:.2%}.",),
        ("Short runs pay for their first samples. In a long one raise every_n_steps, or lower capture.samples.",),
    )


def _losses(story: RunHistory) -> Paragraph | None:
    seen = []
    if story.skipped_lines:
        seen.append(f"{story.skipped_lines} lines of the log were no events: torn by a kill, or of another version.")
    if story.final is not None:
        lost = {n: c for n, c in story.final.export_dropped_total.items() if c}
        errors = {n: c for n, c in story.final.export_errors_total.items() if c}
        seen += [
            f"The exporter {name} dropped {count} measurements: its sink was too slow." for name, count in lost.items()
        ]
        seen += [f"The exporter {name} failed {count} times: see the process's log." for name, count in errors.items()]
    return Paragraph("What is missing from the record", "unknown", tuple(seen), ()) if seen else None


def _sentence(text: str) -> str:
    """First letter raised, full stop at the end.

    >>> _sentence("raise alpha")
    'Raise alpha.'
    """
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
