"""Packing policies: pure, standard library only. `make_policy` builds one by name."""

from collections.abc import Callable
from dataclasses import replace

from mell_scheduler.policy.base import Policy, PolicySettings
from mell_scheduler.policy.best_fit import BestFit
from mell_scheduler.policy.cluster import Cluster
from mell_scheduler.policy.first_fit import FirstFit, RoundRobin
from mell_scheduler.policy.load_balance import LoadBalance, LoadBalanceDrain
from mell_scheduler.policy.mell import Mell
from mell_scheduler.policy.packing import PackingPolicy, Rule, settings_cluster
from mell_scheduler.policy.repack import FRUGAL, Repack
from mell_scheduler.policy.worst_fit import WorstFit

_RULES: dict[str, Callable[[Cluster, PolicySettings], Rule]] = {
    "repack": Repack,
    "repack-frugal": lambda cluster, settings: Repack(cluster, replace(settings, repack=FRUGAL)),
    "mell": Mell,
    "load-balance-drain": LoadBalanceDrain,
    "load-balance": LoadBalance,
    "best-fit": lambda cluster, settings: BestFit(cluster, settings.head_room),
    "worst-fit": lambda cluster, settings: WorstFit(cluster, settings.head_room),
    "first-fit": lambda cluster, settings: FirstFit(cluster, settings.head_room),
    "round-robin": lambda cluster, settings: RoundRobin(cluster, settings.head_room),
}

POLICY_NAMES: tuple[str, ...] = tuple(_RULES)
DEFAULT_POLICY = "repack"


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """Build a policy; raises ValueError naming the known ones."""
    if name not in _RULES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICY_NAMES)}")
    chosen = settings or PolicySettings()
    cluster = settings_cluster(chosen)
    return PackingPolicy(name, cluster, _RULES[name](cluster, chosen))


__all__ = ["DEFAULT_POLICY", "POLICY_NAMES", "Policy", "PolicySettings", "make_policy"]
