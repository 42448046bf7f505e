from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, 0.2 GB, comes with torch's CUDA build; without it: pip install triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mell_gpu_worker.engine.triton_kernels import combine_pieces, paged_attention

SIZES = {"HEADS": 8, "TILE_KEYS": 32, "HEAD_DIM": 64, "PADDED_DIM": 64}
KINDS = {"plain": (0, False, False), "all": (40, True, True)}
POINTERS = {"partial": "*fp32", "scales": "*fp32", "tiles": "*i32", "table": "*i32"}


def compiled(kernel: triton.JITFunction, dtype: str, architecture: int, constants: dict[str, int]) -> bytes:
    """Return a kernel's machine code; this needs no GPU."""
    elements = dict.fromkeys(("out", "query", "keys", "values", "sinks"), f"*{dtype}")
    types = {**elements, **POINTERS, "scaling": "fp32", "softcap": "fp32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    code: bytes = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
    return code


# What multiplications are fused is left to Triton, which warns of a new default.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: kernels are not compiled then")
@pytest.mark.parametrize("target", [("bf16", 90), ("fp32", 90), ("fp16", 80)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split_keys", [0, 512])
def test_the_kernels_compile_for_gpus(
    split_keys: int, kind: str, target: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To machine code, cut and not, with and without window, soft-cap and sinks; whether it runs is another test's."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    window, softcap, sinks = KINDS[kind]
    shared = {**SIZES, "SPLIT_KEYS": split_keys, "WINDOW": window}
    own = {"GROUP": 4, "TILE_ROWS": 16, "BLOCK_TOKENS": 16, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks}
    assert compiled(paged_attention, *target, {**shared, **own})
    if split_keys:
        assert compiled(combine_pieces, *target, shared)
