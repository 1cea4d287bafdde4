"""Sentences about a run: what happened, and what to do next. Plain text; the page cleans and escapes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ess_monitor.diagnosis.absent_metric import NOT_GIVEN, absence
from ess_monitor.records import (
    CONDITION_INFO,
    Action,
    Condition,
    Finding,
    Outcome,
    Reading,
    RunStatus,
    Status,
    condition_title,
    layer_title,
)
from ess_monitor.report.history import RunHistory

ATTENTION: tuple[Condition, ...] = tuple(
    condition for condition in reversed(CONDITION_INFO) if CONDITION_INFO[condition].needs_attention
)
"""Conditions that need attention, the worst first."""

_STATUS_ADVICE: dict[Status, str] = {
    "nonfinite": "The layer's tensors hold NaN or infinity: look at the loss and the learning rate around those steps.",
    "too_short": "The sequences are too short to measure: use sequences of two tokens or more.",
    "timed_out": "Lower capture.samples, capture.heads or positions, or raise runtime.timeout_seconds.",
    "dropped": "The queue was full. Once in a while this is harmless; otherwise raise every_n_steps.",
    "failed": "Capture or computation raised an error. The last message was:",
    "skipped": "ESS is defined for causal layers alone. The reason was:",
    "deferred": "Not all layers fit into the time of a sample, so that they take turns. Lower capture.samples, "
    "capture.heads or positions, or raise runtime.sample_seconds, for more of them in a sample.",
}
_SPARED = (
    "it uses little of its state, which may be right in the first of several layers (it often looks back one token "
    "only), so it is called neither healthy nor collapsed"
)
_TOO_EARLY = "the warm-up was not over, or there were too few measurements"

_EVENTS_OF_A_LAYER = 12
"""Number of newest events in the summary of a layer; the list of events has all."""
_ENDINGS: dict[RunStatus, str] = {
    "failed": "The run failed.",
    "terminated": "The run was told to end (SIGTERM) before it was over.",
}
_SHORT_SEQUENCE_RATIO = 0.9
"""attainable size / TSS below which sequences count as too short to fill the state."""


@dataclass(frozen=True)
class Paragraph:
    """Says what was seen of one thing, and what to do next."""

    heading: str
    seen: tuple[str, ...]
    advice: tuple[str, ...] = ()
    condition: Condition = "unknown"
    """Color of the mark; `unknown` where the paragraph is not about a layer."""


def headline(history: RunHistory) -> str:
    """Return the outcome of the run in one or two sentences."""
    return " ".join(filter(None, [_outcome(history), _ending(history)]))


def paragraphs(history: RunHistory) -> tuple[Paragraph, ...]:
    """Return what needs attention: layers with an alarm or an action, the worst first, then limits of the numbers.

    Layers that ended alike, after like events and with the same advice, share a paragraph.
    """
    noted = _noted(history)
    alike: dict[object, list[Paragraph]] = {}
    for layer in by_attention(history):
        if history.conditions[layer] in ATTENTION or layer in noted:
            paragraph = _layer(history, layer)
            alike.setdefault((paragraph.condition, paragraph.advice, _kinds(history, layer)), []).append(paragraph)
    limits = (_not_measured, _settings, _not_judged, _bad_readings, _short_sequences, _cost, _losses)
    return (*map(_merged, alike.values()), *chain.from_iterable(find(history) for find in limits))


def by_attention(history: RunHistory) -> tuple[str, ...]:
    """Return the layers, those first that need attention, then those with an alarm or an action."""
    rank = {condition: place for place, condition in enumerate(ATTENTION)}
    noted = _noted(history)
    return tuple(
        sorted(history.layers, key=lambda layer: (rank.get(history.conditions[layer], len(rank)), layer not in noted))
    )


def _noted(history: RunHistory) -> set[str]:
    return {finding.layer for finding in alarms(history)} | {action.layer for action in history.actions}


def named(names: Sequence[str], limit: int = 6) -> str:
    """Join names, and count those beyond the limit.

    >>> named(["a", "b", "c"]), named(["a", "b", "c"], limit=2)
    ('a, b and c', 'a, b and 1 more')
    """
    shown = [layer_title(name) for name in names[:limit]]
    if len(names) > limit:
        shown.append(f"{len(names) - limit} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]])) or "none"


def percent(ratio: float | None) -> str:
    """Format a ratio as a percentage.

    >>> percent(0.1875), percent(None)
    ('19 %', 'unknown')
    """
    return "unknown" if ratio is None else f"{100 * ratio:.0f} %"


def alarms(history: RunHistory, layer: str | None = None) -> list[Finding]:
    """Return the findings of a condition that needs attention, of one layer or of all."""
    return [each for each in history.findings if each.condition in ATTENTION and layer in (None, each.layer)]


def timeline(history: RunHistory) -> list[Finding | Action]:
    """Return findings and actions by step; at one step the finding comes before the action that answers it."""
    events: list[Finding | Action] = [*history.findings, *history.actions]
    return sorted(events, key=lambda event: event.step)


def sentence(event: Finding | Action) -> str:
    """Describe a finding with its reason, or an action with its outcome and the utilization before and after."""
    if isinstance(event, Finding):
        return f"{condition_title(event.previous)} → {condition_title(event.condition)}: {event.reason}"
    strength = "" if event.strength is None else f" at {event.strength:g}"
    text = f"{event.action}{strength}, {event.outcome.replace('_', ' ')}: {event.message}"
    if event.utilization_before is not None and event.utilization_after is not None:
        text += f" (utilization {percent(event.utilization_before)} → {percent(event.utilization_after)})"
    return text


def _outcome(history: RunHistory) -> str:
    if not any(map(history.ok, history.layers)):
        return f"Nothing was measured: {'; '.join(_why_nothing(history))}."
    total, conditions = len(history.layers), history.conditions
    alarming = " or ".join(ATTENTION)
    sentences = []
    for condition in ATTENTION:
        if layers := [layer for layer, value in conditions.items() if value == condition]:
            sentences.append(f"{len(layers)} of {total} layers ended {condition}: {named(layers)}.")
    flagged = dict.fromkeys(finding.layer for finding in alarms(history))
    if recovered := [layer for layer in flagged if conditions.get(layer) == "healthy"]:
        sentences.append(f"{len(recovered)} of {total} layers recovered after being {alarming}: {named(recovered)}.")
    if not sentences:
        judged = sum(value != "unknown" for value in conditions.values())
        if not judged:
            return "No layer was judged; the reasons are below."
        sentences.append(f"No layer was {alarming}; {judged} of {total} were judged.")
    if choosing := [layer for layer, value in conditions.items() if value == "forgets_by_choice"]:
        sentences.append(f"{len(choosing)} of {total} layers ended forgetting by choice: {named(choosing)}.")
    if unused := [layer for layer, value in conditions.items() if value == "unused"]:
        sentences.append(f"{len(unused)} of {total} layers ended unused: {named(unused)}.")
    return " ".join(sentences)


def _ending(history: RunHistory) -> str:
    if history.final is None:
        return "The log has no end: the run was killed, or it is still going on."
    return _ENDINGS.get(history.final.status, "")


def _layer(history: RunHistory, layer: str) -> Paragraph:
    events = [event for event in timeline(history) if event.layer == layer][-_EVENTS_OF_A_LAYER:]
    seen = tuple(f"Step {event.step}: {sentence(event)}" for event in events)
    return Paragraph(layer_title(layer), seen, tuple(_advice(history, layer)), history.conditions[layer])


def _kinds(history: RunHistory, layer: str) -> frozenset[str]:
    """Return what happened to a layer, without steps and numbers."""
    return frozenset(
        event.condition if isinstance(event, Finding) else f"{event.action}, {event.outcome}"
        for event in timeline(history)
        if event.layer == layer
    )


def _merged(alike: Sequence[Paragraph]) -> Paragraph:
    if len(alike) == 1:
        return alike[0]
    seen = tuple(f"{each.heading}: {'; '.join(each.seen)}" for each in alike)
    return replace(alike[0], heading=f"{len(alike)} layers: {named([each.heading for each in alike])}", seen=seen)


def _advice(history: RunHistory, layer: str) -> Iterator[str]:
    condition = history.conditions[layer]
    findings = alarms(history, layer)
    outcomes = {action.outcome for action in history.actions if action.layer == layer}
    if findings and findings[-1].advice and condition in ATTENTION:
        yield _sentence(findings[-1].advice)
    if condition == "collapsed":
        if outcomes & {"applied", "failed", "rolled_back"}:
            yield (
                "The autopilot's treatment did not restore the layer: look at features and data before you try a "
                "stronger one."
            )
        elif "dry_run" in outcomes:
            yield "The autopilot only advised. With autopilot.mode='auto' it would have acted."
        elif not outcomes:
            yield "No treatment was tried: the autopilot's modes 'advise' and 'auto' name one where one exists."
    elif condition == "healthy" and findings:
        if "applied" in outcomes:
            yield (
                "Nothing for now. One run cannot tell whether the treatment caused the recovery: train the same seed "
                "without it, and compare both with the command: ess-monitor compare RUN_A RUN_B."
            )
        else:
            yield "Nothing for now: it recovered without a treatment. If that happens often, raise the warm-up."
    elif condition == "forgets_by_choice":
        yield "Nothing: this task needs little memory here, or another layer has it."
    elif condition == "unused":
        yield (
            "Nothing of the past reaches the loss through this layer. If the task needs no past, a layer without a "
            "state would do. If it needs it, the layer has collapsed: only a treatment shows which, and mode 'auto' "
            "with a task metric tries one and takes it back if the loss gains nothing."
        )
    elif condition == "unknown" and outcomes:
        yield "The layer was not judged at the end of the run: train on before you draw a conclusion."


def _settings(history: RunHistory) -> Iterator[Paragraph]:
    if not history.measurements:
        return
    seen, metric = list(history.warnings), history.info.diagnosis.get("metric")
    is_known = metric is None or metric in history.metric_names or history.thinned > 1
    if not (is_known or any(NOT_GIVEN in warning for warning in seen)):  # a short run ends before it says so
        seen.append(absence(str(metric), len(history.measurements), history.metric_names))
    if seen:
        yield Paragraph("Settings to look at", tuple(map(_sentence, seen)))


def _why_nothing(history: RunHistory) -> list[str]:
    """Return what the log knows of why there is no reading with a size."""
    final, samples = history.final, len(history.measurements)
    if not history.layers:
        return ["the model has no layer that can be measured"]
    if samples:
        return [f"no reading of {samples} sample{'s' if samples > 1 else ''} has a size, for the reasons below"]
    if final is None:
        return ["the log has no sample; the run was killed before its first one, or has not come to it yet"]
    counts, health = final.measurements_total, final.health
    reasons = [f"{counts[k]} sampled steps {word}" for k, word in _ENDED.items() if counts.get(k)]
    reasons += [f"{n} failures in {part}" for part, n in health.part_failures_total.items() if n]
    reasons += [f"{part} turned itself off" for part in health.parts_off]
    if counts.get("ok"):
        reasons.append(f"{counts['ok']} sampled steps were measured, and none reached this log")
    after = f"the run ended after {final.steps_total} steps, before its first sample was measured"
    return reasons or [after]


_ENDED: dict[Outcome, str] = {
    "skipped": "were skipped (the queue was full, nothing was captured, or ranks did not agree in time)",
    "failed": "failed",
}


def _not_measured(history: RunHistory) -> Iterator[Paragraph]:
    if any(map(history.ok, history.layers)):
        return
    advice = "Look into the process's log. A sample needs a forward pass whose backward pass reaches parameters."
    if not history.layers:
        advice = "ess-monitor describe TARGET says of each layer why it cannot be measured."
    elif history.final is not None and not history.final.health.parts_off and not history.measurements:
        advice = f"Train longer, or lower every_n_steps. {advice}"
    yield Paragraph("Nothing was measured", tuple(map(_sentence, _why_nothing(history))), (advice,))


def _not_judged(history: RunHistory) -> Iterator[Paragraph]:
    unknown = [layer for layer, condition in history.conditions.items() if condition == "unknown"]
    if not unknown or not history.measurements:
        return
    layers_by_reason: dict[str, list[str]] = {}
    for layer in unknown:
        layers_by_reason.setdefault(_why_not_judged(history, layer), []).append(layer)
    seen = tuple(f"{named(layers)}: {_sentence(reason)}" for reason, layers in layers_by_reason.items())
    advice = ("Lower diagnosis.warmup_steps or train longer.",) if _TOO_EARLY in layers_by_reason else ()
    yield Paragraph("Layers that were not judged", seen, advice)


def _why_not_judged(history: RunHistory, layer: str) -> str:
    info, valid = history.layer(layer), history.ok(layer)
    if info.uninformative:
        return info.uninformative
    if info.capacity_grows or any(reading.capacity_grows for reading in history.readings[layer][-1:]):
        return "its capacity grows with the position (softmax attention)"
    if not valid:
        return "it has no valid reading"
    if layer == history.spared_layer and valid[-1].step >= history.warmup_steps:
        return _SPARED
    return _TOO_EARLY


def _bad_readings(history: RunHistory) -> Iterator[Paragraph]:
    for status, advice in _STATUS_ADVICE.items():
        bad = [each for readings in history.readings.values() for each in readings if each.status == status]
        if bad:
            layers = list(dict.fromkeys(reading.layer for reading in bad))
            last = max(bad, key=lambda reading: reading.step)
            seen = f"{len(bad)} readings of {named(layers)}, the last at step {last.step}."
            message = f" {last.message}" if status in ("failed", "skipped") else ""
            yield Paragraph(f"Readings without a size: {status}", (seen,), (_sentence(advice + message),))


def _short_sequences(history: RunHistory) -> Iterator[Paragraph]:
    last = {layer: history.ok(layer)[-1:] for layer in history.layers}
    short = [layer for layer, readings in last.items() if any(map(_is_short, readings))]
    if short:
        seen = (
            f"{named(short)}: at the measured positions the sequence allows fewer dimensions than the state has, which "
            "lowers the utilization. The conditions take that into account; the heat map does not."
        )
        yield Paragraph(
            "Sequences too short to fill the state", (seen,), ("Measure on longer sequences where the task allows it.",)
        )


def _is_short(reading: Reading) -> bool:
    capacity, attainable = reading.state_capacity, reading.attainable_size
    if not capacity or not attainable or reading.capacity_grows:
        return False
    return attainable < _SHORT_SEQUENCE_RATIO * capacity


def _cost(history: RunHistory) -> Iterator[Paragraph]:
    budget = history.info.overhead_budget_ratio
    cost = history.measurements[-1].overhead_ratio if history.measurements else 0.0
    if budget and cost > 1.5 * budget:
        yield Paragraph(
            "The monitor cost more than its budget",
            (f"It took {cost:.2%} of the training time; the budget was {budget:.2%}.",),
            (
                "The first samples of a run cost the most, which a short run does not make up for. In a long run raise "
                "every_n_steps, or lower capture.samples.",
            ),
        )


def _losses(history: RunHistory) -> Iterator[Paragraph]:
    seen = []
    if history.skipped_lines:
        seen.append(
            f"{history.skipped_lines} lines of the log are not events: cut off by a kill, or of another version."
        )
    if history.events_dropped:
        seen.append(
            f"{history.events_dropped} findings and actions between the first and the newest are counted and not kept: "
            "what is said of layers rests on the others."
        )
    if history.final is not None:
        dropped, errors = history.final.export_dropped_total, history.final.export_errors_total
        seen += [
            f"The exporter {name} dropped {n} measurements: its sink was too slow." for name, n in dropped.items() if n
        ]
        seen += [f"The exporter {name} failed {n} times: see the process's log." for name, n in errors.items() if n]
    if seen:
        yield Paragraph("What is missing from the record", tuple(seen))


def _sentence(text: str) -> str:
    """Capitalize the first letter, and end with a period.

    >>> _sentence("raise alpha")
    'Raise alpha.'
    """
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
