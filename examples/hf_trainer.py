"""Trains a small Mamba on real text under Hugging Face's Trainer, and prints how it uses its memory.

One line attaches the monitor: `callbacks=[ESSMonitorCallback(...)]`. The model is transformers' own `MambaForCausalLM`,
randomly initialized. The text is that of help() (see corpus.py) and is read as bytes. The program takes
less than three minutes on two cores, mostly for the recurrence, which transformers computes token by token on a CPU.

    python examples/hf_trainer.py [--steps 250] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from corpus import VOCABULARY, windows
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

from ess_monitor.integrations.transformers import ESSMonitorCallback

LENGTH, BATCH = 128, 8


class Text(Dataset[dict[str, torch.Tensor]]):
    """Windows of the corpus. Labels equal the inputs: the model shifts them."""

    def __init__(self) -> None:
        self.windows = windows(LENGTH)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.windows[index].long()
        return {"input_ids": tokens, "labels": tokens}


def mamba() -> MambaForCausalLM:
    """Build two layers of 96 channels, each with a state of 8 dimensions."""
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            state_size=8,
            num_hidden_layers=2,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def main() -> None:
    """Train, print a table of the layers at each sample, and print the loss over the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="output folder of the Trainer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the losses and the last readings to FILE")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it warns that there are no kernels for the CPU
    torch.set_num_threads(1)  # the tensors are small: a second thread does not help
    transformers.set_seed(0)

    every = max(1, min(50, arguments.steps // 5))
    callback = ESSMonitorCallback(every_n_steps=every, overhead_budget_ratio=0.05)
    trainer = Trainer(
        mamba(),
        TrainingArguments(
            str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-3,
            warmup_steps=arguments.steps // 10,
            logging_steps=every,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Text(),
        callbacks=[callback],
    )
    trainer.train()

    monitor = callback.monitor
    assert monitor is not None
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    for step, loss in losses.items():
        print(f"step {step}: loss {loss:.3f} (mean of the last {every} steps)")
    print(f"the monitor took {monitor.overhead_ratio:.1%} of the training time")
    if arguments.json is not None:
        readings = [reading.model_dump() for reading in monitor.readings]
        content = {"losses": losses, "readings": readings, "overhead_ratio": monitor.overhead_ratio}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
