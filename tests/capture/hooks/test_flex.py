"""A training whose model runs flex attention is not made to run it as it is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame

from ess_monitor import Monitor, MonitorConfig, capture_operators
from ess_monitor.capture.hooks.compiler import runs_flex_attention
from ess_monitor.featurizers import GLA

stances: list[str] = []


def flex_attention(x: torch.Tensor) -> torch.Tensor:
    stances.append(eval_frame._stance.stance)
    return x


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return flex_attention(x)


class Masked(nn.Module):
    """Makes a mask only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.create_flex_attention_mask(x)

    def create_flex_attention_mask(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def test_a_step_is_not_made_to_run_eagerly_and_the_layers_say_why() -> None:
    model = nn.Sequential(GLA(8, 2), Attention())
    stances.clear()
    with Monitor(model, MonitorConfig(every_n_steps=1), exporters=[]) as monitor:
        for _ in range(3):
            model(torch.randn(2, 6, 8)).square().mean().backward()
            monitor.step()
        (reading,) = monitor.flush()
    assert stances == ["default"] * 3
    assert reading.status == "skipped"
    assert "flex_attention" in reading.message
    assert monitor.snapshot().overhead_seconds["measure"].total_seconds == 0


def test_it_is_read_where_a_pass_is_made_for_it() -> None:
    model = nn.Sequential(GLA(8, 2), Attention())
    assert list(capture_operators(model, torch.randn(2, 6, 8))) == ["0"]


def test_it_is_told_by_the_code_and_by_the_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    for kernel in ("sdpa", "flex_attention"):
        config = transformers.LlamaConfig(**sizes, attn_implementation=kernel)
        assert runs_flex_attention(transformers.LlamaForCausalLM(config)) == (kernel == "flex_attention")
    assert runs_flex_attention(nn.Sequential(Attention()))
    assert not runs_flex_attention(nn.Sequential(Masked(), nn.MultiheadAttention(8, 2)))
