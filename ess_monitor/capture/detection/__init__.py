"""Find the modules that mix tokens: by their class, by their code, and by what their output depends on."""

from ess_monitor.capture.detection.class_names import is_holder, looks_like_mixer, treats_tokens_alone
from ess_monitor.capture.detection.code import A_LOOP, how_code_mixes
from ess_monitor.capture.detection.probe import Mixing, MixingProbe, is_inside

__all__ = [
    "A_LOOP",
    "Mixing",
    "MixingProbe",
    "how_code_mixes",
    "is_holder",
    "is_inside",
    "looks_like_mixer",
    "treats_tokens_alone",
]
