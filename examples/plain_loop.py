"""Trains a small hybrid on real text in a plain PyTorch loop with `Monitor`, autocast and accumulated gradients.

The model has three layers: two gated linear attentions with one softmax attention between them. The text is that of
help() (see corpus.py) and is read as bytes. The program takes less than three minutes on one core. Autocast uses
bfloat16.

    python examples/plain_loop.py [--steps 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from corpus import VOCABULARY, windows
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from ess_monitor import Monitor
from ess_monitor.config import MonitorConfig
from ess_monitor.exporters import EventLogConfig, read_event_log, render_table
from ess_monitor.featurizers import GLA, SA
from ess_monitor.records import Measurement

LENGTH, BATCH, ACCUMULATE, WIDTH = 128, 8, 2, 64


class Block(nn.Module):
    """A mixer and an MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), mixer
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, width) to the same shape."""
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x)


class Hybrid(nn.Module):
    """A model that maps bytes to logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block(mixer(WIDTH, 4)) for mixer in (GLA, SA, GLA)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (batch, length) to (batch, length, vocabulary)."""
        logits: torch.Tensor = self.head(self.blocks(self.embedding(tokens)))
        return logits


def batch_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the next byte over a batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def main() -> None:
    """Train, then print the last table and the ESS of each layer over the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"), help="folder of the event log")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the curves to FILE")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the tensors are small: a second thread does not help
    torch.manual_seed(0)
    text, model = windows(LENGTH + 1), Hybrid()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    log = arguments.out / "events.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    config = MonitorConfig(
        every_n_steps=max(1, min(50, arguments.steps // 6)),
        overhead_budget_ratio=0.05,
        exporters=(EventLogConfig(path=log),),
    )

    # bfloat16 needs no loss scaler. With float16, include the factor by which the scaler multiplies the loss:
    # grad_scale=lambda: scaler.scale(torch.ones((), device=device)) / ACCUMULATE
    with Monitor(model, config, precision="bf16", grad_scale=lambda: 1 / ACCUMULATE) as monitor:
        for _ in range(arguments.steps):
            total = torch.zeros(())
            for _ in range(ACCUMULATE):
                tokens = text[torch.randint(len(text), (BATCH,))].long()
                loss = batch_loss(model, tokens)
                (loss / ACCUMULATE).backward()
                total += loss.detach() / ACCUMULATE
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            # With `replay` the monitor can ask the loss about a layer that looks collapsed.
            monitor.step({"loss": total}, optimizer=optimizer, replay=partial(batch_loss, model, tokens))
        monitor.flush()
        overhead = monitor.overhead_ratio

    measurements = [Measurement.model_validate(e.data) for e in read_event_log(log) if e.event == "measurement"]
    Console().print(render_table(measurements[-1]))
    rows = []
    for m in measurements:
        sizes = {r.layer: [r.effective_size, r.state_capacity] for r in m.readings}
        rows.append({"step": m.step, "loss": m.metrics["loss"], "layers": sizes})
        cells = ", ".join(f"{name} {size:.1f} of {capacity:.0f}" for name, (size, capacity) in sizes.items())
        print(f"step {m.step}: loss {m.metrics['loss']:.3f}; {cells}")
    print(f"the monitor took {100 * overhead:.1f} % of the training time; event log: {log}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "overhead_ratio": overhead}, indent=2))


if __name__ == "__main__":
    main()
