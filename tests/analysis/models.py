"""Small models that analyses are tried on: our featurizers, and real classes of transformers with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor.featurizers import build_mixer

WIDTH = 16


class Mixed(nn.Module):
    """Gated linear attention, softmax attention, and an LSTM that cannot be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.gla = build_mixer("gla", WIDTH, 2, 4)
        self.attention = build_mixer("sa", WIDTH, 2, 4)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, u: Tensor) -> Any:
        return self.lstm(self.attention(self.gla(u)))[0]


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double()


def inputs(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()


@cache
def of_transformers(name: str) -> nn.Module:
    """`mamba2`, `llama`, or `bamba`, a hybrid of both."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    configs: dict[str, Any] = {
        "mamba2": lambda: transformers.Mamba2Config(
            **small, state_size=8, num_heads=4, head_dim=16, n_groups=1, expand=2, chunk_size=8
        ),
        "llama": lambda: transformers.LlamaConfig(**small, **attention),
        "bamba": lambda: transformers.BambaConfig(
            **small, **attention, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, attn_layer_indices=[1]
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()


def tokens(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))
