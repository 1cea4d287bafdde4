"""ESS, TSS and accuracy, over the grid and within runs: Findings 1 and 2, figures 20 and 21."""

from __future__ import annotations

import itertools
import statistics
from typing import Literal

from ess_monitor.analysis import CorrelationDifference, Study, StudyRun, correlate
from ess_monitor.analysis.correlation import pearson
from ess_monitor.report.figures import Figure
from examples.paper.experiment import Finding, Run, Table, Verdict, by_seed, interval, number, paired, shown
from examples.paper.plots import bars, heat_map, scatter
from examples.paper.task_model_sweep.grid import (
    SHORT,
    accuracy_of,
    at,
    demand_of,
    grid_table,
    mixer_of,
    named,
    of_grid,
    of_task,
    places_of,
    setting_of,
)  # fmt: skip

Form = Literal["ess", "entropy"]
_FORMS: tuple[tuple[Form, str], ...] = (("entropy", "entropy-ESS"), ("ess", "tolerance-ESS"))
_COMPARED = ("ESS / demand", "entropy-ESS / demand")


def finding_1(rows: list[Run]) -> Finding:
    """Compare the correlations of ESS and of TSS with accuracy on MQAR."""
    return _across_runs(
        rows,
        "Finding 1",
        "Over all tasks and models, ESS / kv correlates with accuracy significantly better than TSS / kv.",
        "section 3.1, figures 2 and 7, D.1",
        "Softmax attention is left out: its total TSS depends on width and length alone, which do not vary here. "
        "The two values of beta count as mixers of their own; the paper has beta 16. TSS and rules were chosen "
        "with seed 0: there GLA and WLA solved the task at TSS 4, so that TSS 2 was added to have a state that is "
        "too small. With 32 tokens, 4 pairs leave more room between a pair and its query than 8 do, so that more "
        "pairs are not always harder. Runs of one mixer differ in TSS and kv alone; over all runs the decay "
        "differs too, and with it how much of a state can be used.",
    )


def other_tasks(rows: list[Run]) -> list[Finding]:
    """Compare the same correlations on selective copying and on compression, and those within runs."""
    copying, compression = of_task(rows, "selective_copying"), of_task(rows, "compression")
    seen = "Sizes and steps were chosen after single runs with seed 0 "
    return [
        _across_runs(
            copying,
            "Figure 20",
            "In selective copying, too, ESS over the number of tokens to copy is a better proxy of accuracy than TSS "
            "over it.",
            "D.1.4, figures 20a and 20c",
            f"{seen}(1250 steps): of 8 tokens GLA with beta 16 learned .73 with TSS 16 and .56 with TSS 2, LA with TSS "
            "16 .97, and WLA with beta 1 nothing; of 4 tokens GLA learned as much with TSS 2 as with TSS 16.",
        ),
        _across_runs(
            compression,
            "Figure 21",
            "In compression, too, ESS over the size of the vocabulary is a better proxy of accuracy than TSS over it.",
            "D.1.4, figures 21a and 21c",
            f"{seen}(1250 steps): GLA, LA and WLA reached .49 to .59 with a vocabulary of 8, and .14 to .20 with one "
            "of 32, which was left out. Of 16 tokens no H_i has a rank above 8, so that a TSS of 16 cannot be full.",
        ),
        _within_runs(rows),
    ]


def _across_runs(rows: list[Run], name: str, claim: str, source: str, remark: str) -> Finding:
    task = rows[0]["task"]
    study = correlate(
        [
            StudyRun(
                name=str(place), task=task, featurizer=mixer_of(row), demand=demand_of(row),
                state_capacity=row["state_size"], metric=row["accuracy"][-1],
                effective_size=statistics.fmean(row["ess"][-1]), entropy_size=statistics.fmean(row["entropy"][-1]),
            )
            for place, row in enumerate(rows)
        ],
        metric="accuracy", demand=SHORT[task], by_configuration=True,
    )  # fmt: skip
    over_all = {each.quantity: each for each in study.differences if not each.featurizer}
    above = [(over_all[form].low or 0.0) > 0 for form in _COMPARED]
    within = [each for each in study.differences if each.featurizer]
    inside = [sum((each.difference or 0.0) > 0 for each in within if each.quantity == form) for form in _COMPARED]
    mixers = of_grid(rows, mixer_of)
    everywhere = all(2 * count > len(mixers) for count in inside)

    def plain(quantity: str) -> str:
        return quantity.replace("demand", SHORT[task])

    ess, tss = plain("ESS / demand"), plain("TSS / demand")
    of_all = {each.quantity: each.r or 0.0 for each in study.correlations if not each.featurizer}
    alone = pearson([1 / demand_of(row) for row in rows], list(map(accuracy_of, rows))) or 0.0
    control = f" 1 / {SHORT[task]} alone has r = {number(alone)}"
    if alone > max(of_all[form] for form in _COMPARED):
        control += ", more than both: here accuracy follows the task, and the ESS of a net says less than that"
    return Finding(
        name=name,
        claim=claim,
        source=source,
        setting=setting_of(rows),
        rule=f"Reproduced: over all runs, r of {ess} with the final accuracy minus r of {tss} is above 0 with its "
        "95 % interval (bootstrap over configurations, whose seeds stay together), for tolerance-ESS and for "
        "entropy-ESS; and within most of the mixers the difference is above 0 for both. Partly: the interval is above "
        "0 for one of the two forms at least.",
        verdict="reproduced" if all(above) and everywhere else "partly" if any(above) else "not reproduced",
        result="r with accuracy over all runs: "
        + ", ".join(f"{plain(quantity)} {number(r)}" for quantity, r in of_all.items())
        + f". Difference to {tss}: "
        + ", ".join(f"{plain(form)} {_with_interval(over_all[form])}" for form in _COMPARED)
        + f". Within single mixers it is above 0 in {inside[0]} and {inside[1]} of {len(mixers)}.{control}.",
        tables=(_correlations(study),),
        figures=(
            scatter(
                f"Final accuracy over {ess}",
                {mixer: [(statistics.fmean(row["ess"][-1]) / demand_of(row), accuracy_of(row)) for row in rows
                         if mixer_of(row) == mixer] for mixer in mixers},
                x_label=f"tolerance-{ess}", y_label="accuracy",
            ),
            bars(
                "Correlation with accuracy",
                {
                    plain(quantity): {
                        each.featurizer or "all": (each.r, each.low, each.high)
                        for each in study.correlations if each.quantity == quantity and each.low is not None
                    }
                    for quantity in (*_COMPARED, "TSS / demand")
                },
                y_label="r",
            ),
        ),
        remarks=(remark, "That of 1 over the demand alone is a control that was added after looking."),
    )  # fmt: skip


def _correlations(study: Study) -> Table:
    quantities = (*_COMPARED, "TSS / demand", "ESS", "TSS")
    groups = list(dict.fromkeys(each.featurizer for each in study.correlations))
    of = {(each.featurizer, each.quantity): each for each in study.correlations}
    differences = {(each.featurizer, each.quantity): each for each in study.differences}
    names = {quantity: quantity.replace("demand", study.demand) for quantity in quantities}
    less = [f"{names[quantity]} - {names['TSS / demand']}" for quantity in _COMPARED]
    return Table(
        f"Pearson's r with the final accuracy, and by how much it is larger than that of {names['TSS / demand']} (95 % "
        "interval)",
        ("runs", *names.values(), *less),
        tuple(
            (
                f"{group or 'all'} ({of[group, 'ESS'].runs})",
                *(number(of[group, quantity].r) for quantity in quantities),
                *(_with_interval(differences[group, quantity]) for quantity in _COMPARED),
            )
            for group in groups
        ),
    )


def finding_2(rows: list[Run]) -> Finding:
    """Compare the correlations within runs between the least and the most demanding place of the grid of MQAR."""
    small, large = min(row["state_size"] for row in rows), max(row["state_size"] for row in rows)
    few, many = min(demand_of(row) for row in rows), max(demand_of(row) for row in rows)
    mixers = of_grid(rows, mixer_of)
    pairs = {
        form: {
            mixer: paired(
                at(rows, mixer, (many, small)),
                at(rows, mixer, (few, large)),
                lambda row, form=form: _within(row, form),
            )
            for mixer in mixers
        }
        for form, _ in _FORMS
    }
    found = {form: by_seed(itertools.chain(*pairs[form].values())) for form, _ in _FORMS}
    rising = sum(statistics.fmean(by_seed(each)) > 0 for each in pairs["entropy"].values() if each)
    above = bool(found["entropy"]) and interval(found["entropy"])[1] > 0
    return Finding(
        name="Finding 2",
        claim="Over a training, ESS and accuracy correlate less where the task needs little memory and TSS is high "
        "than where it needs much and TSS is low.",
        source="section 3.2, figures 3a, 13 and 19",
        setting="The runs of Finding 1. In each, the correlation of ESS and accuracy over its measurements without the "
        f"first. Compared are {many} pairs with TSS {small} and {few} pairs with TSS {large}, for each mixer and seed.",
        rule="Reproduced: the correlation (entropy-ESS, as in the paper's figure) is larger in the demanding place, "
        "and the 95 % interval of the paired difference (mean over mixers; Student's t over seeds) is above 0. Partly: "
        "the interval includes 0, and the mean over seeds is above 0 in at least four of five mixers.",
        verdict="reproduced" if above else "partly" if 5 * rising >= 4 * len(mixers) else "not reproduced",
        result="Paired difference of the correlations: "
        + ", ".join(f"{name} {shown(found[form])}" for form, name in _FORMS)
        + f". That of entropy-ESS is above 0 in {rising} of {len(mixers)} mixers.",
        tables=tuple(
            grid_table(
                rows, f"Correlation of {name} and accuracy within runs, mean over seeds",
                lambda group, form=form: number(_mean_within(group, form)),
            )
            for form, name in _FORMS
        ),
        figures=(_within_map(rows, "Correlation of entropy-ESS and accuracy within runs, mean over seeds"),),
        remarks=(
            "A full state has the same tolerance-ESS at all times, so that its correlation is undefined (-); such "
            "pairs are left out. In a run that learns nothing the correlation is of noise; it is counted all the same, "
            "as in the paper.",
        ),
    )  # fmt: skip


def _within_runs(rows: list[Run]) -> Finding:
    tasks = of_grid(rows, lambda row: row["task"])
    shares = {task: _share_positive(of_task(rows, task)) for task in tasks}
    more = [a - b for a, b in zip(shares["selective_copying"], shares["mqar"], strict=True)]
    _, low, _ = interval(more)
    verdict: Verdict = "reproduced" if low > 0 else "partly" if statistics.fmean(more) > 0 else "not reproduced"
    return Finding(
        name="Figures 20e and 21e",
        claim="Over a training, ESS and accuracy go along in a larger part of the grid in selective copying than in "
        "MQAR. In compression it looks different.",
        source="D.1.4, figures 20e and 21e",
        setting="The runs of Finding 1 and of figures 20 and 21; in each, the correlation of entropy-ESS and accuracy "
        "over its measurements without the first.",
        rule="Reproduced: of the runs of selective copying, a larger share than of those of MQAR has a correlation "
        "above 0, by the 95 % interval of the difference over seeds. Partly: the mean over seeds is larger.",
        verdict=verdict,
        result="Share of runs whose correlation is above 0: "
        + ", ".join(f"{task.replace('_', ' ')} {shown(share)}" for task, share in shares.items())
        + f". Selective copying less MQAR: {shown(more)}.",
        figures=tuple(
            _within_map(of_task(rows, task), f"Within runs of {task.replace('_', ' ')}: entropy-ESS and accuracy")
            for task in tasks
            if task != "mqar"
        ),
        remarks=(
            "The map of MQAR is that of Finding 2. A correlation that is undefined does not count as above 0. Runs of "
            "MQAR have more steps than the others, and as many measurements.",
        ),
    )


def _share_positive(rows: list[Run]) -> list[float]:
    """Return, for every seed, the share of runs in which entropy-ESS and accuracy correlate positively."""
    seeds = sorted({int(row["seed"]) for row in rows})
    found = {seed: [_within(row, "entropy") for row in rows if row["seed"] == seed] for seed in seeds}
    return [statistics.fmean((r or 0.0) > 0 for r in found[seed]) for seed in seeds]


def _within_map(rows: list[Run], title: str) -> Figure:
    mixers, places = of_grid(rows, mixer_of), places_of(rows)
    return heat_map(
        title,
        [named(place, rows[0]["task"]) for place in places],
        mixers,
        [[_mean_within(at(rows, mixer, place), "entropy") for place in places] for mixer in mixers],
        limits=(-1, 1),
    )


def _within(row: Run, form: Form) -> float | None:
    """Return the correlation of ESS and accuracy over a run, without its first measurement (appendix C.3)."""
    return pearson([statistics.fmean(each) for each in row[form][1:]], row["accuracy"][1:])


def _mean_within(group: list[Run], form: Form) -> float | None:
    known = [r for row in group if (r := _within(row, form)) is not None]
    return statistics.fmean(known) if known else None


def _with_interval(each: CorrelationDifference) -> str:
    ends = "" if each.low is None else f" ({number(each.low)} to {number(each.high)})"
    return number(each.difference) + ends
