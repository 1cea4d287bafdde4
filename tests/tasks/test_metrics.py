"""Loss and accuracy count the asked positions only."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.errors import OperatorError
from ess_monitor.tasks import IGNORED, accuracy, loss, recall_perplexity


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


@pytest.mark.parametrize("separator", [None, 0])
def test_recall_perplexity_is_that_of_pairs_of_tokens_that_came_before_in_the_row(separator: int | None) -> None:
    torch.manual_seed(0)
    tokens, logits = torch.randint(4, (3, 40)), torch.randn(3, 40, 5)
    losses: dict[bool, list[float]] = {True: [], False: []}
    for row, scores in zip(tokens.tolist(), logits.double(), strict=True):
        seen: set[tuple[int, int]] = set()
        for place in range(39):
            bigram = (row[place], row[place + 1])
            if separator is not None and separator in bigram:
                seen = set()
                is_recalled = False
            else:
                is_recalled = bigram in seen
                seen.add(bigram)
            losses[is_recalled].append(float(torch.logsumexp(scores[place], 0) - scores[place, row[place + 1]]))
    found = recall_perplexity(logits, tokens, separator=separator)
    assert (found.recall_tokens, found.rest_tokens) == (len(losses[True]), len(losses[False]))
    assert found.recall == pytest.approx(float(torch.tensor(losses[True]).double().mean().exp()), rel=1e-6)
    assert found.rest == pytest.approx(float(torch.tensor(losses[False]).double().mean().exp()), rel=1e-6)


def test_recall_perplexity_of_nothing_repeated_is_nan_and_wrong_tokens_are_refused() -> None:
    found = recall_perplexity(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]))
    assert found.recall_tokens == 0
    assert found.recall != found.recall
    assert found.rest == pytest.approx(4.0)
    with pytest.raises(OperatorError, match=r"tokens holds one that is not in 0\.\.3"):
        recall_perplexity(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 4]]))
    with pytest.raises(OperatorError, match=r"tokens has shape \(1, 1, 3\)"):
        recall_perplexity(torch.zeros(1, 1, 3, 4), torch.tensor([[[1, 2, 3]]]))
