"""Figure 30, and open question 2: where attention stands in a net of GLA, and whether ESS can tell where it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from ess_monitor.analysis import hybrid_advice
from ess_monitor.analysis.correlation import pearson
from examples.paper.experiment import SEEDS, Experiment, Finding, Run, Table, Verdict, interval, shown
from examples.paper.nets import BATCH, TEST_SEED, Training, evaluate, net, readings, recall_task
from examples.paper.plots import curves, scatter

MIXERS = 4
LENGTH, KV_PAIRS, STEPS, PILOT = 32, 4, 1200, 300
BETA, ROPE_BASE = 16.0, 10.0
TAU = 0.1
"""As in figure 30."""
MARGIN, MARGIN_ESS = 0.05, 0.5
"""Smallest mean differences of accuracy, and of ESS, that count: nets that have all learned nothing differ by less."""
FIXED = 2
"""Place of attention among four mixers in Jamba, whose period of eight has it at place 4."""


def topology(*attention: int) -> str:
    """Return a net as letters, G for GLA and S for attention.

    >>> topology(1)
    'GSGG'
    """
    return "".join("S" if place in attention else "G" for place in range(MIXERS))


ONE = tuple(topology(place) for place in range(MIXERS))
TWO = tuple(topology(*places) for places in ((1, 2), (1, 3)))
GLA = topology()
TOPOLOGIES = (GLA, *ONE, *TWO)


def runs(seeds: Sequence[int], short: bool) -> list[Run]:
    """Return a run for each topology and seed."""
    full = {"steps": STEPS, "pilot": PILOT, "length": LENGTH, "samples": 512}
    sizes = {"steps": 2, "pilot": 1, "length": 16, "samples": 8} if short else full
    return [{"topology": name, "seed": seed, **sizes} for seed in seeds for name in TOPOLOGIES]


def run(settings: Run) -> Run:
    """Train one net; of the one without attention, ask the advice after some steps."""
    name, seed, length = settings["topology"], settings["seed"], settings["length"]
    options = {"beta": BETA} if "G" in name else {}
    options |= {"rope_base": ROPE_BASE} if "S" in name else {}
    mixers = tuple({"G": "gla", "S": "sa"}[letter] for letter in name)
    model = net(seed, featurizer=mixers, depth=MIXERS, mixer_options=options)
    test = recall_task(seed + TEST_SEED, length=length, kv_pairs=KV_PAIRS)
    training = Training(model, recall_task(seed, length=length, kv_pairs=KV_PAIRS))
    inputs = test.batch(range(8))[0]
    found: Run = {"curve": []}

    def look(training: Training) -> None:
        found["curve"].append([training.step, evaluate(model, test, min(128, settings["samples"]))[0]])
        if name == GLA and training.step == settings["pilot"]:
            layers = hybrid_advice(model, inputs).layers
            found["advice"] = [
                {"used": layer.used_ratio, "far": layer.far_share_ratio, "retention": layer.retention_ratio}
                for layer in layers
            ]

    training.run(settings["steps"], min(100, settings["pilot"]), look)
    found["accuracy"], found["loss"] = evaluate(model, test, settings["samples"])
    found["ess"] = [reading.effective_size or 0.0 for reading in readings(model, inputs, tolerance=TAU)]
    return found


Outcomes = dict[str, Run]
"""Runs of one seed by topology."""


def by_seed(rows: list[Run]) -> list[Outcomes]:
    """Return the runs of each seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [{row["topology"]: row for row in rows if row["seed"] == seed} for seed in seeds]


def sizes(row: Run, letter: str) -> list[float]:
    """Return the ESS of all layers of one kind."""
    return [size for size, kind in zip(row["ess"], row["topology"], strict=True) if kind == letter]


def exceeds(differences: Sequence[float], margin: float) -> bool:
    """Return whether differences within seeds are large enough on average, and their interval is above 0."""
    mean, low, _ = interval(differences)
    return mean >= margin and low > 0


def findings(rows: list[Run]) -> list[Finding]:
    """Compare places of attention, what goes along with accuracy, and what the advice would have chosen."""
    seeds = by_seed(rows)
    return [_places(seeds), _proxies(seeds), _advice(seeds)]


def _setting(seeds: list[Outcomes]) -> str:
    first = seeds[0][GLA]
    return (
        f"{MIXERS} mixers, width 32, two heads, TSS 16, beta {BETA:g}, RoPE base {ROPE_BASE:g}; MQAR with {KV_PAIRS} "
        f"pairs in {first['length']} tokens, batch {BATCH}, {first['steps']} steps at rate 5e-3: GLA alone, one layer "
        "of attention in each place, and two in two pairs of places (S: attention, G: GLA; layer 0 comes first). "
        f"Tolerance-ESS ({TAU:g}) per channel on 8 test sequences after training."
    )


def _accuracy(outcomes: Outcomes, name: str) -> float:
    return float(outcomes[name]["accuracy"])


def _places(seeds: list[Outcomes]) -> Finding:
    def later(value: Callable[[Run], float]) -> list[float]:
        return [fmean(value(each[name]) for name in ONE[1:]) - value(each[ONE[0]]) for each in seeds]

    better, fuller = later(lambda row: row["accuracy"]), later(lambda row: max(sizes(row, "S")))
    holds = [exceeds(better, MARGIN), exceeds(fuller, MARGIN_ESS)]
    reversed_ = interval(better)[2] < 0
    gain = [fmean(_accuracy(each, name) for name in ONE) - _accuracy(each, GLA) for each in seeds]
    return Finding(
        name="Figure 30a",
        claim="Nets of GLA with one layer of attention do well, except where it stands first: there it collapses. "
        "GLA alone does badly.",
        source="D.4.2, C.7, figure 30a",
        setting=_setting(seeds),
        rule="Reproduced: with attention in layer 1, 2 or 3 (mean of the three) accuracy is above that with attention "
        f"in layer 0, by {MARGIN} on average at least, and so is the ESS of the attention layer, by {MARGIN_ESS}; each "
        "with a 95 % interval of the differences within seeds above 0. Partly: one of the two.",
        verdict="reproduced" if all(holds) else "partly" if any(holds) else "not reproduced",
        result=f"Later attention less first: accuracy {shown(better)}, ESS of attention {shown(fuller)}"
        + (" (the opposite of the paper)" if reversed_ else "")
        + f". One layer of attention (mean of the places) less none: accuracy {shown(gain)}.",
        tables=(
            Table(
                "Accuracy, and ESS of each layer (mean over seeds)",
                ("", "accuracy", *(f"layer {place}" for place in range(MIXERS))),
                tuple(
                    (name, shown(_accuracy(each, name) for each in seeds),
                     *(f"{fmean(each[name]['ess'][place] for each in seeds):.1f}" for place in range(MIXERS)))
                    for name in TOPOLOGIES
                ),
            ),
        ),
        figures=(
            curves("Accuracy by the place of the one layer of attention; -1: none",
                   {"attention in one place": [
                       (place, *interval(_accuracy(each, name) for each in seeds))
                       for place, name in ((-1, GLA), *enumerate(ONE))]},
                   x_label="layer of attention", y_label="accuracy"),
            curves("Accuracy over training, mean over seeds, with one layer of attention",
                   {name: _curve(seeds, name) for name in (GLA, *ONE)}, x_label="step", y_label="accuracy"),
        ),
        remarks=(
            "The task is learned in a jump, and after a fixed number of steps a net is before or behind it: accuracy "
            "here says how early a net learns, more than how well. The paper trains for 140 000 steps, with 512 pairs "
            "in 2048 tokens, where the size of the state is what limits GLA; the pairs here fit into these states.",
        ),
    )  # fmt: skip


def _curve(seeds: list[Outcomes], name: str) -> list[tuple[float, float, float, float]]:
    columns = zip(*(each[name]["curve"] for each in seeds), strict=True)
    return [(column[0][0], *[fmean(accuracy for _, accuracy in column)] * 3) for column in columns]


_PROXIES: dict[str, Callable[[Run], float]] = {
    "largest ESS of attention": lambda row: max(sizes(row, "S")),
    "mean ESS of attention": lambda row: fmean(sizes(row, "S")),
    "largest ESS of GLA": lambda row: max(sizes(row, "G")),
    "mean ESS of GLA": lambda row: fmean(sizes(row, "G")),
}


def _proxies(seeds: list[Outcomes]) -> Finding:
    names = (*ONE, *TWO)
    accuracies = [[_accuracy(each, name) for name in names] for each in seeds]
    r = {
        label: [
            pearson([value(each[name]) for name in names], found) or 0.0
            for each, found in zip(seeds, accuracies, strict=True)
        ]
        for label, value in _PROXIES.items()
    }
    largest, mean = r["largest ESS of attention"], r["mean ESS of attention"]
    follows = interval(largest)[1] > 0
    better = interval(a - b for a, b in zip(largest, mean, strict=True))[1] > 0
    _, low, high = interval(r["largest ESS of GLA"])
    alone = better and low <= 0 <= high
    verdict: Verdict = "reproduced" if follows and alone else "partly" if follows else "not reproduced"
    return Finding(
        name="Figures 30c and 30d",
        claim="Over hybrids, the largest ESS among attention layers goes along with accuracy, more than their mean "
        "does. That of GLA layers does not.",
        source="D.4.2, figures 30c and 30d",
        setting="The six nets of figure 30a with one or two layers of attention; Pearson's r with accuracy over the "
        "six, in each seed.",
        rule="Partly: r of the largest ESS among attention layers has a 95 % interval over seeds above 0. Reproduced: "
        "besides, it is above r of their mean (interval of the differences within seeds), and the interval of r of "
        "the largest ESS among GLA layers holds 0.",
        verdict=verdict,
        result="; ".join(f"{label}: r = {shown(values)}" for label, values in r.items()) + ".",
        figures=tuple(
            scatter(
                title,
                {
                    group: [(value(each[name]), _accuracy(each, name)) for each in seeds for name in members]
                    for group, members in (("one layer of attention", ONE), ("two", TWO))
                },
                x_label=f"tolerance-ESS ({TAU:g})",
                y_label="accuracy",
            )
            for title, value in (
                ("Accuracy and largest ESS of attention", _PROXIES["largest ESS of attention"]),
                ("Accuracy and largest ESS of GLA", _PROXIES["largest ESS of GLA"]),
            )
        ),
        remarks=("The ESS is that of the trained net: that it goes along with accuracy makes it no cause of it.",),
    )


def chosen(outcomes: Outcomes, measure: str) -> str:
    """Return the net whose attention replaces the layer of GLA with the largest value of a measure."""
    values = [layer[measure] or 0.0 for layer in outcomes[GLA]["advice"]]
    return topology(values.index(max(values)))


def _advice(seeds: list[Outcomes]) -> Finding:
    policies: dict[str, Callable[[Outcomes], tuple[str, ...]]] = {
        "fullest (the advice)": lambda each: (chosen(each, "used"),),
        "farthest back": lambda each: (chosen(each, "far"),),
        f"fixed, layer {FIXED}": lambda each: (topology(FIXED),),
        "mean over places": lambda each: ONE,
    }
    accuracy = {
        label: [fmean(_accuracy(each, name) for name in policy(each)) for each in seeds]
        for label, policy in policies.items()
    }
    advice = accuracy["fullest (the advice)"]
    gains = {
        label: [a - b for a, b in zip(advice, accuracy[label], strict=True)]
        for label in (f"fixed, layer {FIXED}", "mean over places")
    }
    above = {label: exceeds(values, MARGIN) for label, values in gains.items()}
    best = [max(_accuracy(each, name) for name in ONE) - found for each, found in zip(seeds, advice, strict=True)]
    return Finding(
        name="Open question 2",
        claim="ESS may tell how to build hybrids, better than policies with fixed places such as Jamba's. How is left "
        "open.",
        source="D.4.2, summary",
        setting=f"A net of GLA alone is trained for {seeds[0][GLA]['pilot']} steps. Then `hybrid_advice` ranks its "
        "layers by the share of the attainable state that they use (tau 0.1 of each token's output); attention takes "
        "the place of the fullest layer. The outcome is that of the net with attention there, "
        f"trained from the start ({seeds[0][GLA]['steps']} steps, as in figure 30a); all places were trained, so that "
        "the choice is compared with each of them.",
        rule="Reproduced: with one layer of attention, the advice's place is better than the fixed one, and than the "
        "mean over all places (as a random one is on average), each by "
        f"{MARGIN} of accuracy on average at least and with a 95 % interval of the differences within seeds above 0. "
        "Partly: than the mean over places alone. Otherwise the question stays open.",
        verdict="reproduced" if all(above.values()) else "partly" if above["mean over places"] else "open",
        result="Accuracy at the advice's place less that of "
        + ", ".join(f"{label}: {shown(values)}" for label, values in gains.items())
        + f". The best place is better than the advice's by {shown(best)}.",
        tables=(
            Table(
                "Accuracy by policy, and the nets that it chose",
                ("", "accuracy", "nets, by seed"),
                tuple(
                    (label, shown(accuracy[label]),
                     ", ".join(policy(each)[0] if len(policy(each)) == 1 else "all" for each in seeds))
                    for label, policy in policies.items()
                ),
            ),
            Table(
                "The layers of GLA after the first steps, mean over seeds",
                ("", *(f"layer {place}" for place in range(MIXERS))),
                tuple(
                    (label, *(f"{fmean(each[GLA]['advice'][place][key] or 0.0 for each in seeds):.2f}"
                              for place in range(MIXERS)))
                    for label, key in (("share of the attainable state", "used"), ("far share", "far"),
                                       ("retention", "retention"))
                ),
            ),
        ),
        figures=(
            scatter("Accuracy with attention in a place, and how full the layer of GLA was there",
                    {f"layer {place}": [(each[GLA]["advice"][place]["used"] or 0.0, _accuracy(each, name))
                                        for each in seeds] for place, name in enumerate(ONE)},
                    x_label="share of the attainable state, GLA alone, after the first steps", y_label="accuracy"),
        ),
        remarks=(
            "The first steps of the net of GLA come on top of the budget of the chosen one, which begins anew: layers "
            "are not exchanged within a trained net. Four places and few seeds can show a large advantage alone.",
        ),
    )  # fmt: skip


EXPERIMENT = Experiment("hybrids", runs, run, findings, SEEDS[:4])
