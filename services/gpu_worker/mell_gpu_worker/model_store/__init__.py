"""The model store: pulls a model once into a cache folder, checked, ready to load. Knows no engine and no torch."""

from mell_gpu_worker.model_store.errors import ModelStoreError
from mell_gpu_worker.model_store.store import Progress, pull, verify

__all__ = ["ModelStoreError", "Progress", "pull", "verify"]
