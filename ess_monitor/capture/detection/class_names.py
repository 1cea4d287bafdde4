"""What the name of a class, and the modules inside it, say: a mixer, a part of one, or a block that holds one."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

POINTWISE = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
)
"""Classes of torch that treat each vector of the last axis by itself. `nn.Linear` mixes tokens where they are on that
axis."""
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_MIXER = re.compile(
    r"attention|attn|mamba|deltanet|delta_?rule|retention|rwkv|recurren|hyena|longconv|fftconv|fourier|timemix|mixer"
    r"|lstm|titans|depth_?wise_?conv|dw_?conv|focalnetlayer|linear_?memory|neural_?memory|moving_?average|toeplitz|s4d?(?![0-9a-z])|s5|s6|h3(?![0-9a-z])",
    re.IGNORECASE,
)
"""Parts of names that are words of the field wherever they stand."""
_MIXER_WORDS = re.compile(
    r"ssm|ssms|lru|gru|rnn|sru|qrnn|ema|mha|mqa|gqa|mla|gla|gss|dss|ttt|based|rebased|mega|memory|hgrn|gau|aft|fnet"
    r"|s4|s5|s6|ssd|retnet|gateloop|mingru|hawk|griffin"
)
"""Words that stand for themselves: inside of other words they mean nothing."""
_PART = re.compile(
    r"(norm|embeddings?|embedder|mlp|feed_?forward|ffn|experts?|router|rotary|(?<!attention)head|mask|loss|dropout|config|cache"
    r"|bias|encoding|scheduler|pooler|gate|classifier|projection|conv2d|conv3d|quantizer|moe|lm|output)$",
    re.IGNORECASE,
)
"""Modules that carry the name of the architecture they belong to."""
_NO_MIXER = re.compile(r"mixture|\bmoe|lora|adapter|channel_?mix", re.IGNORECASE)
_HOLDER = re.compile(
    r"(model|block|blocks|stack|encoder|decoder|backbone|transformer|network|net|lm|sequential|list|stage|tower"
    r"|pretrained|encoderlayer|decoderlayer|group)\d*$|For[A-Z]\w+$",
    re.IGNORECASE,
)
_NO_HOLDER = re.compile(r"(delta|fnet|ret)net$", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|^ff$|^fc\d$|channel_?mix|experts", re.IGNORECASE)


_TREATS_TOKENS_ALONE = re.compile(r"norm|rotary|router|experts?|moe|embeddings?|embedder|loss|masks?", re.IGNORECASE)


def treats_tokens_alone(cls: type[nn.Module]) -> bool:
    """Return whether a class is called like a part that reads or places tokens and mixes none, whatever its code does.

    >>> class SharedExperts(nn.Module): ...
    >>> treats_tokens_alone(SharedExperts), treats_tokens_alone(nn.GRU)
    (True, False)
    """
    return any(map(_TREATS_TOKENS_ALONE.fullmatch, words(cls.__name__)[-1:])) or "moe" in words(cls.__name__)


def words(name: str) -> list[str]:
    """Return the words of a class name.

    >>> words("mLSTMCell"), words("MultiHeadEMA"), words("S4DKernel")
    (['m', 'lstm', 'cell'], ['multi', 'head', 'ema'], ['s', '4', 'd', 'kernel'])
    """
    return [word.lower() for word in _WORD.findall(name)]


def looks_like_mixer(cls: type[nn.Module]) -> bool:
    """Return whether a class is called like a sequence mixer.

    >>> class MinGRU(nn.Module): ...
    >>> class MinGRUNorm(nn.Module): ...
    >>> class Schema(nn.Module): ...
    >>> looks_like_mixer(MinGRU), looks_like_mixer(MinGRUNorm), looks_like_mixer(Schema)
    (True, False, False)
    """
    name = cls.__name__
    if _PART.search(name) or _NO_MIXER.search(name):
        return False
    return bool(_MIXER.search(name)) or any(map(_MIXER_WORDS.fullmatch, (*words(name), name.lower())))


def is_holder(module: nn.Module, mixers: Collection[nn.Module]) -> bool:
    """Return whether a module is a block, a stack or a model around the `mixers` that it holds."""
    name = type(module).__name__
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    if any(isinstance(part, nn.Embedding) or hasattr(type(part), "get_input_embeddings") for part in module.modules()):
        return True
    if _HOLDER.search(name) and not _NO_HOLDER.search(name):
        return True
    children = dict(module.named_children())
    if any(_FEED_FORWARD.search(child) or _FEED_FORWARD.search(type(m).__name__) for child, m in children.items()):
        return True
    ids = {id(mixer) for mixer in mixers}
    for items in children.values():
        if isinstance(items, (nn.ModuleList, nn.Sequential)):
            holding = [item for item in items if any(id(part) in ids for part in item.modules())]
            if len(holding) > 1 or any(id(item) not in ids for item in holding):
                return True
    return False
