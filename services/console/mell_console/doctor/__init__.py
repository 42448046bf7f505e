"""`mell doctor`: says whether this machine has what Mell needs, and what to do about what it lacks."""
