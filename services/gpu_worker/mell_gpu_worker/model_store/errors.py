"""What can go wrong when a model is pulled, as one line for a person."""

import errno


class ModelStoreError(Exception):
    """The model could not be had; the message is one line that says why and what to do."""


def disk_error(error: OSError) -> ModelStoreError:
    """Return what to tell about a file operation that failed."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ModelStoreError(
            f"no disk space left while writing {error.filename or 'the model'}; free some and repeat"
        )
    return ModelStoreError(f"cannot write {error.filename or 'the model'}: {error.strerror or error}")
