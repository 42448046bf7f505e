"""What every process of a run stands on."""

from dataclasses import dataclass

from tests.cluster.simulation.judge import Judge
from tests.cluster.simulation.lease_store import LeaseStore
from tests.cluster.simulation.links import Links
from tests.cluster.simulation.network import Network


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The broker, the data plane, the lease's bucket, and who watches it all."""

    network: Network
    links: Links
    store: LeaseStore
    judge: Judge
