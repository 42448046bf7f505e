"""MELL, the paper's algorithm (§VI-C, Fig. 10), with what the paper leaves out. See `fig10` and `batching`."""

from mell_scheduler.policy.mell.batching import Mell

__all__ = ["Mell"]
