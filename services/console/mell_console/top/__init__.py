"""`mell top`: the cluster in a terminal, from second to second."""
