"""Simulator: replays a trace against policies and counts GPUs, moves and latency. No torch, no numpy."""
