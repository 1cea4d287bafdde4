"""Settings of the counterfactual evidence: how many batches are run again, and what counts as treatable.

The thresholds on the loss separate 19 true collapses from all 37 healthy runs with a suspected layer of the first
record of `benchmarks.trust` (small nets on a CPU: local text, Markov sources, copy tasks against MQAR), and were fixed
before the runs that are held out now. The two on KL separate 24 findings on healthy runs from 13 collapses, and were
chosen afterwards.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ess_monitor.validation.settings import Settings


class EvidenceConfig(Settings):
    """Sets what a collapse must be supported by before a layer is called collapsed.

    Examples:
        >>> EvidenceConfig(batches=16).batches
        16
    """

    model_config = ConfigDict(allow_inf_nan=False)

    enabled: bool = True
    """Run batches again before a layer with a decay is called collapsed. Off, the rules alone decide and mode auto acts
    on them: they called 10 of 28 healthy runs collapsed, and treatment made each of the 10 worse."""
    batches: int = Field(default=8, ge=1, le=1024)
    """Batches of the training that are run again, one a step, four forward passes each. One is too few for a ratio of
    two small changes of the loss; 8 cost about as much as 11 training steps, once for each finding."""
    cut_ratio: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Change of the loss with A = 0, as a share of the loss, from which the past counts as used. Below it m50 / cut is
    a ratio of two noises."""
    far_share_ratio: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of a token's output that comes from afar (an eighth of the sequence or more), below which a layer is not
    treatable: it needs what is near, and finds it. Collapsed layers are at .20 to 1.0, those of healthy runs whose past
    is used at .00005 to .053."""
    far_m50_share: float = Field(default=0.12, gt=0.0, lt=1.0)
    """A layer whose output comes from afar is treatable where remembering more costs less than this share of `cut`.
    Collapsed layers are at -.006 to .019, half escaped ones, whose past is worth little, at .033 to .101."""
    m50_share: float = Field(default=0.03, gt=0.0, lt=1.0)
    """The same, of a layer of which no far share is known. Healthy layers are at .019 to .77, so that some would be
    called collapsed."""
    m50_ratio: float = Field(default=0.05, gt=0.0)
    """Change of the loss with A^0.5, as a share of it, from which a layer is not treatable, whatever the past is worth.
    Collapsed layers are at -.004 to .017; where a task is solved, with a loss near 0, at 1 to 250."""
    silent_ratio: float = Field(default=0.001, gt=0.0, lt=1.0)
    """Change of the loss, as a share of it, below which a layer counts as silent: neither A = 0 nor A^0.1 reaches the
    loss. The diagnosis calls it unused."""
    kl_share: float = Field(default=0.025, gt=0.0, lt=1.0)
    """As `m50_share`, by KL of the outputs: collapsed layers are at .0006 to .015, healthy ones at .047 to 2.5."""
    kl_silent: float = Field(default=0.003, gt=0.0)
    """KL of the outputs with A^0.1, in nats, below which a layer counts as silent."""
    state_ratio: float = Field(default=0.12, gt=0.0)
    """Change of the loss without a quarter of the state dimensions, as a share of the loss, from which a full state
    counts as too small. Of the seen half of `benchmarks.saturation`, states of which twice as much gains something are
    at .14 to 5 at the end of their training, others at -.003 to .10."""
    state_kl: float = Field(default=0.05, gt=0.0)
    """The same by KL of the outputs, in nats. No labeled run was judged by it: it is what `state_ratio` is for a loss
    of about half a nat."""
    recheck_measurements: int = Field(default=20, ge=1)
    """Measurements after which a layer that forgets by choice is asked again, if the rules still propose a collapse: a
    curriculum or a change of the data can turn the choice into a fault."""
