"""The GPU worker: an inference engine over a paged KV pool, and the migration of running sequences."""
