"""The worker's pure core: blocks, sequences, batching; no torch, no asyncio, no clock."""
