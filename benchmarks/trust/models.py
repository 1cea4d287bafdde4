"""Builds the models of the runs: small backbones of the paper's mixers, and Mamba models of transformers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from benchmarks.trust.settings import ModelSettings
from ess_monitor.featurizers import FEATURIZERS, Backbone, BackboneConfig


class HFLogits(nn.Module):
    """Returns the logits of a causal language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map (batch, length) to (batch, length, vocabulary)."""
        logits: Tensor = self.model(tokens_BL, use_cache=False).logits
        return logits


def is_available(settings: ModelSettings) -> bool:
    """Return whether the library that the model needs is installed."""
    return settings.featurizers[0] in FEATURIZERS or find_spec("transformers") is not None


def build_model(settings: ModelSettings, vocabulary: int) -> nn.Module:
    """Return a model with random weights."""
    if settings.featurizers[0] not in FEATURIZERS:
        return HFLogits(_transformers(settings, vocabulary))
    return Backbone(
        BackboneConfig(
            vocab_size=vocabulary,
            width=settings.width,
            depth=len(settings.featurizers),
            featurizer=settings.featurizers,
            state_size=settings.state_size,
            mixer_options=settings.options,
        )
    )


def _transformers(settings: ModelSettings, vocabulary: int) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()  # it warns that its compiled kernels are missing
    name = settings.featurizers[0]
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": settings.width,
        "state_size": settings.state_size,
        "num_hidden_layers": len(settings.featurizers),
    }
    if name == "Mamba2":
        sizes |= {"num_heads": 4, "head_dim": settings.width // 2, "n_groups": 1, "chunk_size": 32}
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    return model
