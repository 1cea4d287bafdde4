"""Computes loss and accuracy on the positions that are asked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.tasks.base import IGNORED


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the positions whose target is not -100.

    Args:
        logits: (..., vocab_size).
        targets: (...) int64.

    Returns:
        A scalar tensor on the logits' device; NaN when no position is asked.

    Raises:
        OperatorError: The shapes do not go together, or a dtype or device is wrong.

    Examples:
        >>> import torch
        >>> loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """
    _check(logits, targets)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of positions with a target other than -100 whose largest logit is the target's.

    Args, returns and errors as in `loss`.

    Examples:
        >>> import torch
        >>> accuracy(torch.eye(4)[None], torch.tensor([[0, 1, 0, -100]]))
        tensor(0.6667)
    """
    _check(logits, targets)
    asked = targets != IGNORED
    return ((logits.argmax(-1) == targets) & asked).sum() / asked.sum()


class RecallPerplexity(NamedTuple):
    """Perplexities of next tokens, exp of the mean cross-entropy; NaN where no token is of the kind."""

    recall: float
    """Of tokens that end a bigram which came before in the row: the context holds the answer."""
    rest: float
    """Of all others."""
    recall_tokens: int
    """How many end a repeated bigram."""
    rest_tokens: int


@torch.no_grad()
def recall_perplexity(logits: Tensor, tokens: Tensor, *, separator: int | None = None) -> RecallPerplexity:
    """Return the perplexity on repeated bigrams and on the rest (section 4.4; Arora et al., 2023). Waits for a device.

    Token t + 1 is recalled where the pair of tokens t and t + 1 has come before in its row.

    Args:
        logits: (batch, length, vocab_size); those at token t are for token t + 1, so the last are not used.
        tokens: (batch, length) int64, what the model was given.
        separator: bigrams from before the last token of this kind do not count as seen, and none holds it.

    Raises:
        OperatorError: The shapes do not go together, a dtype or device is wrong, or a token is not in the vocabulary.
        ConfigError: `separator` is not the number of a token.

    Examples:
        >>> import torch
        >>> found = recall_perplexity(torch.zeros(1, 5, 4), torch.tensor([[1, 2, 3, 1, 2]]))
        >>> round(found.recall, 6), found.recall_tokens, found.rest_tokens
        (4.0, 1, 3)
    """
    _check(logits, tokens, "tokens")
    if tokens.dim() != 2:
        raise OperatorError(f"tokens has shape {tuple(tokens.shape)}, expected (batch, length).")
    if bool(((tokens < 0) | (tokens >= logits.shape[-1])).any()):
        raise OperatorError(f"tokens holds one that is not in 0..{logits.shape[-1] - 1}, the vocabulary of the logits.")
    losses = F.cross_entropy(logits[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none").flatten()
    document, is_separator = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    if separator is not None:
        is_separator = tokens == validation.whole("separator", separator, 0, hint="the number of a token")
        document = is_separator.long().cumsum(1)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    bigrams = torch.stack([rows[:, 1:], document[:, 1:], tokens[:, :-1], tokens[:, 1:]], dim=-1).flatten(0, 1)
    unique = torch.unique(bigrams, dim=0, return_inverse=True, return_counts=True)
    kind, counts = unique[1:]
    order = kind.argsort(stable=True)
    firsts = order[counts.cumsum(0) - counts]
    is_recalled = torch.ones_like(kind, dtype=torch.bool).index_fill_(0, firsts, False)
    is_recalled &= ~(is_separator[:, 1:] | is_separator[:, :-1]).flatten()
    recall, rest = losses[is_recalled], losses[~is_recalled]
    return RecallPerplexity(float(recall.mean().exp()), float(rest.mean().exp()), len(recall), len(rest))


def _check(logits: Tensor, targets: Tensor, name: str = "targets") -> None:
    validation.tensor("logits", logits, "(..., vocab_size)", range(2, 65), error=OperatorError)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise OperatorError(f"{name} is {validation.shown(targets)}; pass token ids of dtype torch.int64.")
    if targets.device != logits.device:
        raise OperatorError(f"{name} is on {targets.device} and logits on {logits.device}; move them to one device.")
    if not logits.shape[-1]:
        raise OperatorError(f"logits has shape {tuple(logits.shape)}; the vocabulary is empty.")
    if logits.shape[:-1] != targets.shape:
        raise OperatorError(
            f"logits {tuple(logits.shape)} and {name} {tuple(targets.shape)} do not go together; expected "
            "(..., vocab_size) and (...) with the same leading sizes."
        )
