"""Packing policies: pure, standard library only. `make_policy` builds one by name."""

from collections.abc import Callable
from dataclasses import replace

from mell_scheduler.policy.base import Policy, PolicySettings
from mell_scheduler.policy.best_fit import BestFit
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.first_fit import FirstFit, RoundRobin
from mell_scheduler.policy.load_balance import LoadBalance, LoadBalanceDrain
from mell_scheduler.policy.mell import Mell
from mell_scheduler.policy.own import MakeRule, is_own, load_rule
from mell_scheduler.policy.packing import PackingPolicy, Rule, settings_cluster
from mell_scheduler.policy.repack import FRUGAL, Repack
from mell_scheduler.policy.worst_fit import WorstFit


def _unmoved(rule: Callable[[Cluster, float], Rule]) -> MakeRule:
    """A rule for what stays where it is placed, with the head-room that this needs."""

    def make(cluster: Cluster, settings: PolicySettings) -> Rule:
        head_room = settings.fixed_head_room
        return rule(cluster, settings.head_room if head_room is None else head_room)

    return make


_RULES: dict[str, MakeRule] = {
    "repack": Repack,
    "repack-frugal": lambda cluster, settings: Repack(cluster, replace(settings, repack=FRUGAL)),
    "mell": Mell,
    "load-balance-drain": LoadBalanceDrain,
    "load-balance": LoadBalance,
    "best-fit": _unmoved(BestFit),
    "worst-fit": _unmoved(WorstFit),
    "first-fit": _unmoved(FirstFit),
    "round-robin": _unmoved(RoundRobin),
}
_FIXED_RULES: dict[str, str] = {
    "repack": "best-fit",
    "repack-frugal": "best-fit",
    "mell": "best-fit",
    "load-balance-drain": "worst-fit",
    "load-balance": "worst-fit",
}
"""How policies that count on moves place where there are none: so none is worse there than that baseline."""

POLICY_NAMES: tuple[str, ...] = tuple(_RULES)
UNMOVED_NAMES = ("worst-fit", "best-fit", "first-fit", "round-robin")
"""Those that never move anything."""
DEFAULT_POLICY = "repack"


def check_policy(name: str) -> None:
    """Raise ValueError unless `name` is one of ours or names a rule that can be loaded (and is, by this)."""
    _make_rule(name)


def _make_rule(name: str) -> MakeRule:
    if is_own(name):
        return load_rule(name)
    if name not in _RULES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICY_NAMES)}, or module:class")
    return _RULES[name]


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """Build a policy: one of ours, or around a rule of somebody else's at `module:class`. Raises ValueError."""
    chosen = settings or PolicySettings()
    cluster = settings_cluster(chosen)
    rule = _make_rule(name)(cluster, chosen)
    fixed = _FIXED_RULES.get(name)
    return PackingPolicy(name, cluster, rule, rule if fixed is None else _RULES[fixed](cluster, chosen))


__all__ = [
    "DEFAULT_POLICY",
    "POLICY_NAMES",
    "UNMOVED_NAMES",
    "Policy",
    "PolicySettings",
    "check_policy",
    "is_own",
    "make_policy",
]
