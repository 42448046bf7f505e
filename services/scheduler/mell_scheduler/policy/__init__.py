"""Packing policies: pure, standard library only. `make_policy` builds one by name."""

from collections.abc import Callable

from mell_scheduler.policy.base import Policy, PolicySettings
from mell_scheduler.policy.best_fit import BestFit
from mell_scheduler.policy.packing import PackingPolicy, settings_cluster


def _best_fit(settings: PolicySettings) -> Policy:
    cluster = settings_cluster(settings)
    return PackingPolicy("best-fit", cluster, BestFit(cluster, settings.head_room))


_BUILDERS: dict[str, Callable[[PolicySettings], Policy]] = {
    "best-fit": _best_fit,
}

POLICY_NAMES: tuple[str, ...] = tuple(_BUILDERS)
DEFAULT_POLICY = "repack"


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """Build a policy; raises ValueError naming the known ones."""
    if name not in _BUILDERS:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICY_NAMES)}")
    return _BUILDERS[name](settings or PolicySettings())


__all__ = ["DEFAULT_POLICY", "POLICY_NAMES", "Policy", "PolicySettings", "make_policy"]
