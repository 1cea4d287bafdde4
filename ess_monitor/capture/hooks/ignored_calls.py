"""Say why a layer gave no operator in a forward pass that it was to be read in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.records import Status

_STATES = ("initial_state", "recurrent_state", "initial_states", "cache_params", "past_key_values", "past_key_value")
DEFERRED = (
    "there was no time for it in this sample (runtime.sample_seconds); layers take turns, and those that have waited "
    "longest come first"
)
SEVERAL_CALLS = (
    "calls its op more than once in one forward pass, so that its y is not T u with the T of one of the calls; give "
    "each call a module of its own, or leave the layer out with `layers`"
)
SPREAD = (
    "it runs inside context_parallel, where a process has some of the tokens only, so its state is spread over all "
    "of them; measure without context parallelism, or train without the monitor"
)
TRANSFORMED = (
    "the model runs inside of a transform of torch.func (vmap, grad, jvp), where its tensors stand for many; call it "
    "without the transform to measure it"
)
FLEX = (
    "the model runs flex_attention, which a sampled step would run as it is written, with the scores of all pairs of "
    "tokens in memory; train with another kernel (attn_implementation='sdpa') to measure it, or profile a small batch"
)
RECORDED = (
    "the forward pass was being recorded into a CUDA graph, which would repeat the copies at every replay and reads "
    "nothing; call the model outside of the graph at some steps to measure it"
)
UNTRAINED = (
    "it was called, but no gradient arrived at what it put out, so none of its passes trains; to measure batches of an "
    "evaluation set capture.source='validation'"
)


class Ignored(NamedTuple):
    """Why a call was not read."""

    status: Status
    reason: str


def why_ignored(call: Call) -> Ignored:
    """Return why an adapter takes a call for none of a whole sequence."""
    lengths = _attention_lengths(call)
    if lengths is not None and lengths[0] != lengths[1]:
        queries, keys = lengths
        return Ignored(
            "failed",
            f"the call has {queries} queries and {keys} keys: those of a cache, a learned prefix or another sequence "
            "are among them, so T is not square; call the model without them, or leave the layer out with `layers`",
        )
    given: dict[str, Any] = {**call.layer_kwargs, **call.kwargs}
    states = [name for name in _STATES if given.get(name) is not None]
    if states and (lengths is None or lengths[0] > 1):
        return Ignored(
            "failed",
            f"the call continues from a state before its first token ({states[0]}), so that T is not that of a whole "
            "sequence; call the model without a cache",
        )
    return Ignored("too_short", "a sequence of 1 token has no past to remember; ESS needs at least 2")


def why_not_seen(site: CallSite, *, was_called: bool) -> str:
    """Return why a layer was not read, of which no call was seen at the place where it is read."""
    if not was_called:
        return (
            "its forward was not called in this pass, by code that hooks can see; leave the layer out with `layers`, "
            "or call the model with inputs that reach it"
        )
    ops = " or ".join(op.name for op in site.ops) or site.path
    return (
        f"its forward was called, and took a branch that does not call {ops}, at which it would be read; switch to the "
        "branch that does, teach its class with @ess_monitor.register_capture, or leave it out with `layers`"
    )


def is_transformed() -> bool:
    """Return whether the code that runs is inside of a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_recorded(device_type: str) -> bool:
    """Return whether this thread's current stream records a graph: what it launches is then not run, but repeated."""
    if device_type == "cpu":
        return False
    is_capturing = getattr(torch.get_device_module(device_type), "is_current_stream_capturing", None)
    return is_capturing is not None and bool(is_capturing())


def _attention_lengths(call: Call) -> tuple[int, int] | None:
    """Return the number of queries and keys; None for other calls."""
    values = list(call.kwargs.values())
    q, k = (call.kwargs.get("query"), call.kwargs.get("key"))
    if q is None and call.op == "ALL_ATTENTION_FUNCTIONS" and len(values) > 2:
        q, k = values[1:3]
    if isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() >= 3:
        return q.shape[-2], k.shape[-2]
    return None
