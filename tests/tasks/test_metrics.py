"""Loss and accuracy count the asked positions only."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.errors import OperatorError
from ess_monitor.tasks import IGNORED, accuracy, loss


def test_both_equal_their_definitions_on_the_asked_positions() -> None:
    logits = torch.randn(3, 10, 7)
    targets = torch.randint(7, (3, 10)).masked_fill(torch.rand(3, 10) < 0.5, IGNORED)
    losses, hits = [], []
    for sample, target in zip(logits.reshape(-1, 7), targets.flatten().tolist(), strict=True):
        if target != IGNORED:
            losses.append(-(sample[target] - torch.logsumexp(sample, 0)))
            hits.append(float(sample.argmax() == target))
    torch.testing.assert_close(loss(logits, targets), torch.stack(losses).mean())
    torch.testing.assert_close(accuracy(logits, targets), torch.tensor(hits).mean())


def test_positions_that_are_not_asked_get_no_gradient() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss(logits, torch.tensor([[IGNORED, 2, IGNORED, IGNORED]])).backward()
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [[False, True, False, False]]


def test_nothing_asked_gives_nan() -> None:
    logits, targets = torch.randn(2, 3, 4), torch.full((2, 3), IGNORED)
    assert loss(logits, targets).isnan()
    assert accuracy(logits, targets).isnan()


@pytest.mark.parametrize("function", [loss, accuracy])
def test_shapes_that_do_not_go_together_are_refused(function: object) -> None:
    with pytest.raises(OperatorError, match=r"logits \(2, 3, 4\) and targets \(2, 4\) do not go together"):
        function(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
