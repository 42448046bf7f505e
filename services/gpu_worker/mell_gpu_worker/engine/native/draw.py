"""Draws tokens in C++, as `engine.draw` defines it and several times as fast."""

import ctypes

import torch

from mell_gpu_worker.engine.draw import DrawParams
from mell_gpu_worker.engine.native.structs import Draw


class NativeDraw:
    """`engine.draw.Drawing` for CPUs, done at once."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._threads = threads

    def __call__(self, logits: torch.Tensor, params: DrawParams) -> torch.Tensor:
        """Return one token id a row from float32 logits [rows, vocab] (vocab below 2**22)."""
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        # Held here, since the structure holds addresses only.
        logits = logits.contiguous()
        columns = {name: getattr(params, name).contiguous() for name in DrawParams.__dataclass_fields__}
        for name, column in columns.items():
            kind = torch.int64 if name == "top_k" else torch.float64
            assert column.dtype == kind, f"{name} is {column.dtype}"
            assert len(column) == rows, f"{name} has {len(column)} values for {rows} rows"
        assert logits.dtype == torch.float32
        draw = Draw(
            rows=rows,
            vocab=vocab,
            logits=logits.data_ptr(),
            tokens=tokens.data_ptr(),
            threads=min(self._threads, rows),
            **{name: column.data_ptr() for name, column in columns.items()},
        )
        self._library.mell_draw(ctypes.byref(draw))
        return tokens
