"""`ess_monitor.ess`, `ess_monitor.featurizers`, `ess_monitor.tasks`."""

from __future__ import annotations

from typing import Any

import torch

from ess_monitor import ess, featurizers, tasks
from ess_monitor.ess import Operator
from tests.honesty.case import Case
from tests.honesty.data import floats, recurrence

VALUES_STAY_ON_THE_DEVICE = (
    IndexError,
    "which tokens or classes a tensor holds is read by the device alone: looking would wait for it",
)
DTYPES_ARE_TORCHS = (
    RuntimeError,
    "autocast and FSDP decide on dtype and device between this call and the parameters: torch's own error",
)
NO_SUCH_SAMPLE = (IndexError, "what Python's protocol of sequences asks for, and says so in the docstring")


def used(operator: Operator) -> Any:
    """Everything that is asked of an operator in a measurement."""
    return ess.measure(operator, ess.operator_positions(operator.length, 2)), operator.materialize()


def _vectors(*names: str) -> dict[str, Any]:
    return {name: floats(1, 2, 6, 3) for name in names}


ESS: dict[str, Case] = {
    "aggregate": Case(ess.aggregate, lambda: {"ess": torch.rand(1, 2, 3), "position": 1}),
    "decay_product_norm": Case(ess.decay_product_norm, lambda: {"operator": recurrence()}),
    "entropy_ess": Case(ess.entropy_ess, lambda: {"singular_values": torch.rand(2, 3)}),
    "ess_bounds": Case(ess.ess_bounds, lambda: {"positions": [2, 4], "ess": torch.ones(2), "length": 6, "capacity": 4}),
    "far_share": Case(ess.far_share, lambda: {"operator": recurrence(), "position": 3, "distance": 1}),
    "mean_decay": Case(ess.mean_decay, lambda: {"operator": recurrence()}),
    "measure": Case(ess.measure, lambda: {"operator": recurrence(), "positions": [2]}),
    "midpoint_index": Case(ess.midpoint_index, lambda: {"positions": [2, 4], "length": 6}),
    "operator_positions": Case(ess.operator_positions, lambda: {"length": 6, "positions": 2}),
    "retention": Case(ess.retention, lambda: {"operator": recurrence(), "positions": [2]}),
    "retention_ratio": Case(ess.retention_ratio, lambda: {"ess": torch.ones(3), "undecayed_ess": torch.ones(3)}),
    "tolerance_ess": Case(ess.tolerance_ess, lambda: {"singular_values": torch.rand(2, 3)}),
    "Convolution": Case(
        lambda **given: used(ess.Convolution(**given)), lambda: {"kernel": floats(1, 2, 3), "length": 6}
    ),
    "GatedConvolution": Case(
        lambda **given: used(ess.GatedConvolution(**given)),
        lambda: {"b": floats(1, 2, 6), "kernel": floats(1, 2, 3), "c": floats(1, 2, 6)},
    ),
    "DenseOperator": Case(
        lambda **given: used(ess.DenseOperator(**given)), lambda: {"T": floats(1, 2, 6, 6).tril(), "block_size": 2}
    ),
    "causal_singular_values": Case(ess.causal_singular_values, lambda: {"operator": recurrence(), "positions": [1, 3]}),
    "squared_norm": Case(ess.squared_norm, lambda: {"operator": recurrence()}),
    "tail_energy": Case(ess.tail_energy, lambda: {"operator": recurrence(), "sizes": [0, 2], "positions": [1, 3]}),
    "truncation_errors": Case(
        ess.truncation_errors, lambda: {"realization": ess.realize(recurrence()), "sizes": [0, 2]}
    ),
    "realize": Case(ess.realize, lambda: {"operator": recurrence(), "size": 2}),
    "Realization.outputs": Case(ess.realize(recurrence()).outputs, lambda: {"inputs": floats(1, 2, 6, 1, 3)}),
    "Realization.truncated": Case(ess.realize(recurrence()).truncated, lambda: {"size": 2}),
    "complex_recurrence": Case(
        lambda **given: used(ess.complex_recurrence(**given)), lambda: _vectors("log_decay", "b", "c")
    ),
    "DiagonalRecurrence": Case(
        lambda **given: used(ess.DiagonalRecurrence(**given)), lambda: _vectors("log_decay", "b", "c")
    ),
    "JacobianOperator": Case(
        lambda **given: ess.measure(ess.JacobianOperator(**given), [3]),
        lambda: {
            "inputs": floats(1, 1, 6, 2),
            "function": lambda u: u.cumsum(1),
            "tolerance": 0.1,
            "largest": 4,
            "is_divisible": True,
        },
    ),
    "ReadFirstRecurrence": Case(
        lambda **given: used(ess.ReadFirstRecurrence(**given)), lambda: _vectors("log_decay", "b", "c")
    ),
    "DeltaRecurrence": Case(
        lambda **given: used(ess.DeltaRecurrence(**given)),
        lambda: {**_vectors("log_decay", "k", "q", "left", "right"), "beta": torch.rand(1, 2, 6)},
    ),
    "DeltaRecurrence.diagonal_plus_rank_one": Case(
        lambda **given: used(ess.DeltaRecurrence.diagonal_plus_rank_one(**given)),
        lambda: _vectors("log_decay", "left", "right", "b", "c"),
        named={"b": "b|k", "c": "q"},
    ),
    "SoftmaxAttention": Case(
        lambda **given: used(ess.SoftmaxAttention(**given)),
        lambda: {**_vectors("q", "k"), "mask": torch.zeros(6, 6), "sinks": torch.zeros(1, 2, 1), "softcap": 2.0},
    ),
    "Operator.singular_values": Case(
        lambda positions: recurrence().singular_values(positions), lambda: {"positions": [1, 3]}
    ),
    "Operator.state_capacity": Case(
        lambda positions: recurrence().state_capacity(positions), lambda: {"positions": [1, 3]}
    ),
    "Operator.select": Case(
        lambda **given: used(recurrence().select(**given)), lambda: {"samples": [0], "heads": [1], "length": 4}
    ),
    "Operator.map": Case(lambda function: recurrence().map(function), lambda: {"function": torch.Tensor.double}),
}

_SIZES = {"width": 8, "num_heads": 2}


def _mixer(name: str) -> Case:
    def call(**given: Any) -> Any:
        return featurizers.FEATURIZERS[name](**given)(floats(2, 5, 8))

    sizes = {"width": 8} if name == "s6" else dict(_SIZES)
    return Case(call, lambda: dict(sizes), named={"u": "u_BLD"})


def _forward(name: str) -> Case:
    letters = "u_BLE" if name == "s6" else "u_BLD"

    def call(**given: Any) -> Any:
        torch.manual_seed(0)
        return featurizers.build_mixer(name, 8, 2, 4)(given[letters])

    return Case(call, lambda: {letters: floats(2, 5, 8)}, named={letters: "u"}, allowed={letters: DTYPES_ARE_TORCHS})


def _backbone_config(**given: Any) -> Any:
    return featurizers.BackboneConfig(**{"vocab_size": 12, "width": 8, "state_size": 4, **given})


FEATURIZERS: dict[str, Case] = {
    **{featurizers.FEATURIZERS[name].__name__: _mixer(name) for name in featurizers.FEATURIZERS},
    **{f"{featurizers.FEATURIZERS[name].__name__}.forward": _forward(name) for name in featurizers.FEATURIZERS},
    "Backbone": Case(featurizers.Backbone, lambda: {"config": _backbone_config()}),
    "Backbone.forward": Case(
        lambda tokens_BL: featurizers.Backbone(_backbone_config())(tokens_BL),
        lambda: {"tokens_BL": torch.randint(12, (2, 5))},
        named={"tokens_BL": "tokens"},
        allowed={"tokens_BL": VALUES_STAY_ON_THE_DEVICE},
    ),
    "BackboneConfig": Case(featurizers.BackboneConfig, lambda: {"vocab_size": 12}),
    "CausalSoftmax": Case(featurizers.CausalSoftmax),
    "CausalSoftmax.forward": Case(
        lambda **given: featurizers.CausalSoftmax()(**given),
        lambda: {**_vectors("q", "k", "v"), "scale": 0.5},
        allowed=dict.fromkeys("qkv", DTYPES_ARE_TORCHS),
    ),
    "DiagonalScan": Case(featurizers.DiagonalScan),
    "DiagonalScan.forward": Case(
        lambda **given: featurizers.DiagonalScan()(**given),
        lambda: {**_vectors("q", "k", "v"), "log_decay": -torch.rand(1, 2, 6, 3)},
    ),
    "diagonal_scan": Case(
        featurizers.diagonal_scan, lambda: {**_vectors("q", "k", "v"), "log_decay": -torch.rand(1, 2, 6, 3)}
    ),
    "build_mixer": Case(
        lambda **given: featurizers.build_mixer(**given)(floats(2, 5, 8)),
        lambda: {"name": "gla", "width": 8, "num_heads": 2, "state_size": 4, "beta": 2.0, "gate_rank": 2},
        named={"name": "featurizer|option"},
    ),
    "check_options": Case(
        featurizers.check_options,
        lambda: {"names": ("wla",), "options": {"beta"}},
        named={"names": "names|featurizer|option"},
    ),
}


def _sample(task: type[tasks.SyntheticTask], config: Any) -> Any:
    return task(config).batch([0])  # type: ignore[arg-type]


class _Zeros(tasks.SyntheticTask):
    """The smallest task of a user's own."""

    def _generate(self, index_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return index_B[:, None], index_B[:, None]


def _batch(indices: Any) -> Any:
    return tasks.MQAR(tasks.MQARConfig(length=16, kv_pairs=2, vocab_size=12)).batch(indices)


_LOGITS = {"logits": floats(2, 3, 4), "targets": torch.tensor([[0, 1, -100], [2, 3, -100]])}

TASKS: dict[str, Case] = {
    "Compression": Case(
        lambda config: _sample(tasks.Compression, config), lambda: {"config": tasks.CompressionConfig()}
    ),
    "Documents": Case(lambda config: _sample(tasks.Documents, config), lambda: {"config": tasks.DocumentsConfig()}),
    "MQAR": Case(lambda config: _sample(tasks.MQAR, config), lambda: {"config": tasks.MQARConfig()}),
    "SelectiveCopying": Case(
        lambda config: _sample(tasks.SelectiveCopying, config), lambda: {"config": tasks.SelectiveCopyingConfig()}
    ),
    "SyntheticTask": Case(lambda samples: _Zeros(samples)[0], lambda: {"samples": 3}),
    "SyntheticTask.batch": Case(_batch, lambda: {"indices": [0, 3]}, allowed={"indices": NO_SUCH_SAMPLE}),
    "CompressionConfig": Case(lambda **given: _sample(tasks.Compression, tasks.CompressionConfig(**given))),
    "DocumentsConfig": Case(lambda **given: _sample(tasks.Documents, tasks.DocumentsConfig(**given))),
    "MQARConfig": Case(lambda **given: _sample(tasks.MQAR, tasks.MQARConfig(**given))),
    "SelectiveCopyingConfig": Case(
        lambda **given: _sample(tasks.SelectiveCopying, tasks.SelectiveCopyingConfig(**given))
    ),
    "TaskConfig": Case(tasks.TaskConfig),
    "accuracy": Case(tasks.accuracy, lambda: dict(_LOGITS)),
    "recall_perplexity": Case(
        tasks.recall_perplexity,
        lambda: {"logits": floats(2, 3, 4), "tokens": torch.tensor([[0, 1, 0], [2, 3, 1]]), "separator": 0},
    ),
    "loss": Case(tasks.loss, lambda: dict(_LOGITS), allowed={"targets": VALUES_STAY_ON_THE_DEVICE}),
}
