"""Live migration: a running sequence goes on at another worker, and its client does not notice."""
