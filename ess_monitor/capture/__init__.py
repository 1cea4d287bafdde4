"""Find the sequence mixers of a model and capture the operators that they apply."""

from ess_monitor.capture.capture_pass import capture_operators
from ess_monitor.capture.captured import Captured, CaptureFailure
from ess_monitor.capture.check import CaptureCheck, check_capture
from ess_monitor.capture.handles import AlphaHandle, DecayHandle, Transition
from ess_monitor.capture.hooks.token_ids import ModulationConfig
from ess_monitor.capture.layers import Layer, LayerFilter, find_layers, layer_infos
from ess_monitor.capture.registry import register_capture
from ess_monitor.capture.rotation import CaptureConfig
from ess_monitor.capture.sampler import Sampler
from ess_monitor.capture.spec import CaptureSpec
from ess_monitor.capture.token_probe import TokenProbe

__all__ = [
    "AlphaHandle",
    "CaptureCheck",
    "CaptureConfig",
    "CaptureFailure",
    "CaptureSpec",
    "Captured",
    "DecayHandle",
    "Layer",
    "LayerFilter",
    "ModulationConfig",
    "Sampler",
    "TokenProbe",
    "Transition",
    "capture_operators",
    "check_capture",
    "find_layers",
    "layer_infos",
    "register_capture",
]
