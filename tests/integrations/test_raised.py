"""A training of the Hugging Face Trainer that fails in a sampled step, and that nobody closes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.helpers import callback, hf_trainer, hooks

pytest.importorskip("transformers")


class Llama(nn.Module):
    """Takes the Trainer's tokens, and fails in a step of the test's choice."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.llama = LlamaForCausalLM(config)
        self.calls = 0
        self.fail_at: int | None = None
        self.llama.model.layers[1].mlp.register_forward_pre_hook(self._fail)

    def _fail(self, *given: Any) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ZeroDivisionError("injected")

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.llama(tokens, labels=tokens)


def traces() -> tuple[object, str]:
    """What is in the process of a sample under way."""
    from torch._dynamo import eval_frame
    from transformers.models.llama import modeling_llama

    return modeling_llama.ALL_ATTENTION_FUNCTIONS, eval_frame._stance.stance


@pytest.mark.parametrize("fail_at", [1, 4], ids=["first step", "a later step"])
def test_a_failed_training_leaves_no_tap_and_no_hook_and_the_next_one_is_measured(tmp_path: Path, fail_at: int) -> None:
    model, before = Llama(), traces()
    bare = hooks(model)
    ess = callback("transformers")
    model.fail_at = fail_at
    trainer = hf_trainer(tmp_path, model, ess, steps=6)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert traces() == before
    assert hooks(model) == bare
    trainer.train()
    assert {r.status for r in ess.monitor.readings} == {"ok"}
    assert {r.layer for r in ess.monitor.readings} == {f"llama.model.layers.{k}.self_attn" for k in range(2)}
    assert traces() == before
    assert hooks(model) == bare
