"""The rows of the table in docs/reliability.md: each test tells its own, `report` collects them."""

import json
import os
from pathlib import Path

from tests.cluster.faults.crowd import Crowd

FOLDER = os.environ.get("MELL_FAULTS_FOLDER", "")
"""Where rows go; empty: nowhere, this run is a test only."""
FIGURES = bool(FOLDER)


def told(topic: str, fault: str, where: str, sees: str, test: str, *crowds: Crowd) -> None:
    """Write down what clients saw of a fault, and how long they waited at most."""
    if not FIGURES:
        return
    row = {
        "topic": topic,
        "fault": fault,
        "where": where,
        "sees": sees,
        "test": test,
        "running_s": max(crowd.pauses.running for crowd in crowds),
        "first_s": max(crowd.pauses.first for crowd in crowds),
        "load": os.getloadavg()[0],
        "answers": sum(crowd.answers for crowd in crowds),
    }
    name = f"{topic}-{fault}-{where}".replace("/", " ")
    Path(FOLDER, f"{name}.json").write_text(json.dumps(row))
