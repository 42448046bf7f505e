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

_Builder = Callable[[PolicySettings], Policy]


def _fit(name: str, rule: Callable[[Cluster, float], Rule]) -> _Builder:
    """A baseline without migration, made from its way of choosing a GPU."""

    def build(settings: PolicySettings) -> Policy:
        cluster = settings_cluster(settings)
        return PackingPolicy(name, cluster, rule(cluster, settings.head_room))

    return build


def _repack(settings: PolicySettings) -> Policy:
    cluster = settings_cluster(settings)
    return PackingPolicy("repack", cluster, Repack(cluster, settings))


def _repack_frugal(settings: PolicySettings) -> Policy:
    cluster = settings_cluster(settings)
    return PackingPolicy("repack-frugal", cluster, Repack(cluster, replace(settings, repack=FRUGAL)))


def _mell(settings: PolicySettings) -> Policy:
    cluster = settings_cluster(settings)
    return PackingPolicy("mell", cluster, Mell(cluster, settings))


def _load_balance(settings: PolicySettings) -> Policy:
    cluster = settings_cluster(settings)
    return PackingPolicy("load-balance", cluster, LoadBalance(cluster, settings))


def _load_balance_drain(settings: PolicySettings) -> Policy:
    cluster = settings_cluster(settings)
    return PackingPolicy("load-balance-drain", cluster, LoadBalanceDrain(cluster, settings))


_BUILDERS: dict[str, _Builder] = {
    "repack": _repack,
    "repack-frugal": _repack_frugal,
    "mell": _mell,
    "load-balance-drain": _load_balance_drain,
    "load-balance": _load_balance,
    "best-fit": _fit("best-fit", BestFit),
    "worst-fit": _fit("worst-fit", WorstFit),
    "first-fit": _fit("first-fit", FirstFit),
    "round-robin": _fit("round-robin", RoundRobin),
}

POLICY_NAMES: tuple[str, ...] = tuple(_BUILDERS)
DEFAULT_POLICY = "repack"


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """Build a policy; raises ValueError naming the known ones."""
    if name not in _BUILDERS:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICY_NAMES)}")
    return _BUILDERS[name](settings or PolicySettings())


__all__ = ["DEFAULT_POLICY", "POLICY_NAMES", "Policy", "PolicySettings", "make_policy"]
