"""Colours of states and outcomes, the same in every table."""

STATE_STYLES = {"active": "green", "standby": "dim", "draining": "yellow", "drained": "cyan", "silent": "red"}
OUTCOME_STYLES = {"moving": "yellow", "committed": "green", "failed": "red", "timeout": "red", "ended": "dim"}
