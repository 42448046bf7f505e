"""The scheduler: packs requests onto GPUs online; its policies, and a simulator around the same core."""
