"""Shows that a reading is of the real tokens of one sequence, however a batch holds them.

    python -m benchmarks.padding [--json FILE]

The same 24 tokens go through small, randomly initialized layers: alone, padded to 64 tokens on either side, and packed
between two other sequences. Each row of the table is one form and kernel. The condition is that of a monitor that
watches a few steps without learning, with a task metric that stands still; softmax attention is never judged. A row
that differs from the tokens alone fails.

The layers have no short convolution, because the reference ops of transformers let one see the packed sequence before.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers import delta
from benchmarks.layers.mamba import hf
from benchmarks.report import Result, main
from ess_monitor import Monitor, MonitorConfig, profile
from ess_monitor.featurizers import GLA
from ess_monitor.records import Reading

REAL, ROW, BEFORE = 24, 64, 17
FORMS = ("alone", "right-padded", "left-padded", "packed")
STEPS = 4
CONFIG = MonitorConfig.load(
    environment=False,
    every_n_steps=1,
    overhead_budget_ratio=None,
    diagnosis={
        "warmup_steps": 0,
        "patience": 1,
        "saturated_patience": 1,
        "metric": "accuracy",
        "metric_solved": 0.9,
        "metric_new_values": 1,
        "spare_first_layer": False,
    },
)


class MaskedGLA(nn.Module):
    """GLA below an embedding. Masks and positions are used at the top only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mixer = GLA(16, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        x = self.embed(input_ids)
        y: Tensor = self.mixer(x if attention_mask is None else x * attention_mask[..., None])
        return y


@dataclass(frozen=True)
class Family:
    """A kind of layer, and how to build a model of it."""

    build: Callable[[str], nn.Module]
    """Takes the name of a kernel."""
    kernels: tuple[str, ...] = ("",)
    packed_by: tuple[str, ...] = ("position_ids",)
    """What a packed row is called with."""


def drop_padded_queries(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """Compute attention as flash kernels do: told by a mask of (batch, length), and with rows of 0 for padding."""
    segment = options["position_ids"].diff(dim=1, prepend=options["position_ids"][:, :1]).ne(1).cumsum(1)
    keep = (segment[:, None, :, None] == segment[:, None, None, :]).tril()
    if mask is not None:
        keep = keep & (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    y = nn.functional.scaled_dot_product_attention(q, k, v, keep, scale=options.get("scaling"))
    return torch.where(keep.any(3, keepdim=True), y, 0.0).transpose(1, 2).contiguous(), None


def _llama(kernel: str) -> nn.Module:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("drops padded queries", drop_padded_queries)
    AttentionMaskInterface.register("drops padded queries", flash_attention_mask)
    return hf("Llama", num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, attn_implementation=kernel)[0]


def _mamba2(kernel: str) -> nn.Module:
    return hf("Mamba2", num_heads=4, head_dim=8, state_size=8, n_groups=1, conv_kernel=1, num_hidden_layers=1)[0]


def _delta_rule(kernel: str) -> nn.Module:
    settings = {**delta.GATED_DELTA, "linear_conv_kernel_dim": 1}
    return delta.hf("Qwen3_5", "Qwen3_5TextConfig", **settings)()[0]


FAMILIES = {
    "softmax attention": Family(_llama, ("eager", "sdpa", "flex_attention", "drops padded queries")),
    "Mamba-2": Family(_mamba2, packed_by=("seq_idx",)),
    "GLA": Family(lambda kernel: MaskedGLA()),
    "delta rule": Family(_delta_rule, packed_by=("position_ids", "cu_seq_lens_q")),
}


def built(name: str, kernel: str) -> nn.Module:
    """Return the model of a family, in float64; the same for all kernels."""
    torch.manual_seed(0)
    model = FAMILIES[name].build(kernel).double()
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model


def inputs(form: str, packed_by: tuple[str, ...] = ("position_ids",)) -> dict[str, Tensor]:
    """Return the arguments of a model: the same tokens, in one of `FORMS`."""
    generator = torch.Generator().manual_seed(0)
    tokens, others = (torch.randint(1, 32, (1, size), generator=generator) for size in (REAL, ROW - REAL))
    if form == "alone":
        return {"input_ids": tokens}
    if form == "packed":
        sizes = (BEFORE, REAL, ROW - REAL - BEFORE)
        row = torch.cat([others[:, :BEFORE], tokens, others[:, BEFORE:]], 1)
        packing = {
            "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
            "seq_idx": torch.repeat_interleave(torch.tensor(sizes)).int()[None],
            "cu_seq_lens_q": torch.tensor([0, *sizes]).cumsum(0).int(),
        }
        return {"input_ids": row, **{name: packing[name] for name in packed_by}}
    padding, ones = torch.zeros_like(others), torch.ones_like(tokens)
    order = slice(None, None, 1 if form == "right-padded" else -1)
    row, mask = (torch.cat([real, padding][order], 1) for real in (tokens, ones))
    return {"input_ids": row, "attention_mask": mask}


def reading_of(model: nn.Module, given: dict[str, Tensor]) -> Reading:
    """Return the reading of the first layer that a profile has."""
    return profile(model, config=CONFIG, **given).readings[0]


def condition_of(model: nn.Module, kernel: str, given: dict[str, Tensor]) -> str:
    """Return the condition of the first layer after a few steps at a learning rate of 0."""
    if kernel == "flex_attention":
        return "unknown"  # it has no backward pass on a CPU, and attention is not judged
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model.train(), CONFIG) as monitor:
        for _ in range(STEPS):
            output = model(**given)
            getattr(output, "logits", output).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(metrics={"accuracy": 0.1}, optimizer=optimizer)
            monitor.flush()
        return monitor.conditions[monitor.readings[0].layer]


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield every family, kernel and form."""
    for name, family in FAMILIES.items():
        for kernel in family.kernels:
            for form in FORMS:
                yield name, kernel, form


def run() -> Result:
    """Measure every case."""
    logging.disable(logging.WARNING)  # the libraries warn about each missing kernel
    rows, failures, alone = [], [], {}
    for name, kernel, form in cases():
        model, given = built(name, kernel), inputs(form, FAMILIES[name].packed_by)
        reading = reading_of(model, given)
        row = {
            "layer": name,
            "form": form,
            "kernel": kernel or "its own",
            "ESS": reading.effective_size,
            "TSS": reading.state_capacity,
            "utilization": reading.utilization_ratio,
            "condition": condition_of(model, kernel, given),
        }
        rows.append(row)
        compared = tuple(value for key, value in row.items() if key not in ("form", "kernel"))
        if compared != alone.setdefault(name, compared):
            failures.append(f"{name}, {form}, {row['kernel']}: differs from the tokens alone")
    return Result(f"{REAL} tokens, alone and in rows of {ROW}", rows, failures=failures)


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
