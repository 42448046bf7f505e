"""Policies that are not ours: a rule named `module:attribute`, found as Python finds modules."""

import importlib
from collections.abc import Callable

from mell_scheduler.policy.base import PolicySettings
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.packing import Rule

MakeRule = Callable[[Cluster, PolicySettings], Rule]


def is_own(name: str) -> bool:
    """Whether a policy's name says where its rule is, rather than naming one of ours."""
    return ":" in name


def load_rule(name: str) -> MakeRule:
    """Return what makes the rule at `module:attribute`; importing it runs it. Raises ValueError."""
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no policy at {name!r} ({error}); is its folder in PYTHONPATH?") from error
    if not callable(made):
        kind = type(made).__name__
        raise ValueError(f"{name!r} makes no policy: {kind}, not a class with choose and plan")  # noqa: TRY004 - a setting
    rule: MakeRule = made
    return rule
