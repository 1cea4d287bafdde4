"""Treats collapsed layers: the A->I regularizer, alpha re-initialization, and the autopilot that decides when."""

from ess_monitor.interventions.alpha import AlphaCopy, rescale_alpha, restore_alpha
from ess_monitor.interventions.alpha_advice import AlphaAdvice, advise_alpha
from ess_monitor.interventions.autopilot import Autopilot
from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.interventions.identity_pull import IdentityPull, add_penalty_gradient, identity_penalty
from ess_monitor.interventions.penalty import Penalties, collect_penalties

__all__ = [
    "AlphaAdvice",
    "AlphaCopy",
    "Autopilot",
    "AutopilotConfig",
    "IdentityPull",
    "Penalties",
    "add_penalty_gradient",
    "advise_alpha",
    "collect_penalties",
    "identity_penalty",
    "rescale_alpha",
    "restore_alpha",
]
