"""Small values on their way from the host to the device, without waiting for what the device is doing."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def upload(values: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the host's values on the device; the host goes on before they are there.

    A copy from ordinary memory would first wait for all that was launched before. On CPU nothing is copied.
    """
    host = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
