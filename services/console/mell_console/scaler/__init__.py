"""Starts and stops workers, as many as the scheduler wants: a pure core, a loop around it, and ports that do it."""
