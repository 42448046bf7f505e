"""What `mell bench` can be told."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from mell_shared.settings import CommandLineSettings


class BenchSettings(CommandLineSettings):
    """Load an OpenAI-compatible server at --url (or the first argument) and report what its clients see."""

    model_config = SettingsConfigDict(env_prefix="MELL_BENCH_", cli_prog_name="mell bench")

    url: str = Field("http://127.0.0.1:8000", pattern=r"^https?://", description="The server, with or without /v1.")
    model: str = Field("", description="Model to ask for; empty: the first that the server lists.")
    api_key: str = Field("", description="Bearer key, if the server asks for one.")
    endpoint: Literal["chat", "completions"] = Field("chat", description="Which of the two APIs to load.")
    concurrency: int = Field(8, ge=1, le=100_000, description="Closed loop: requests kept in flight.")
    rate: float = Field(0.0, ge=0, description="Open loop instead: requests started each second, whatever comes back.")
    arrivals: Literal["poisson", "uniform"] = Field("poisson", description="Open loop: how the starts are spread.")
    requests: int = Field(0, ge=0, description="Requests to measure; 0: 100, or all of the trace, or by duration.")
    duration_s: float = Field(0.0, ge=0, description="Start no request after this time; 0: no limit.")
    lengths: Literal["fixed", "lognormal"] = Field("fixed", description="How synthetic lengths are drawn.")
    prompt_tokens: int = Field(128, ge=1, description="Prompt length: all (fixed) or the mean (lognormal).")
    output_tokens: int = Field(64, ge=1, description="Output length: all (fixed) or the mean (lognormal).")
    spread: float = Field(0.7, ge=0, le=3, description="Lognormal: standard deviation of a length's logarithm.")
    trace: Path | None = Field(
        None, description="CSV (also .gz) of arrival_s,prompt_tokens,output_tokens; open loop at its times."
    )
    speedup: float = Field(1.0, gt=0, description="Replay the trace's arrivals this many times faster.")
    ignore_eos: bool = Field(True, description="Make answers as long as asked; a server may not know the field.")
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature of every request.")
    warm_up: int = Field(2, ge=2, description="Requests before the measured ones; they also calibrate the prompts.")
    timeout_s: float = Field(600.0, gt=0, description="Longest time for one request.")
    seed: int = Field(0, ge=0, description="Of lengths, arrivals and prompts.")
    json_to: str = Field(
        "",
        alias="json",
        description="Write the report as JSON to this file; `-`, or no value at the end: print that instead.",
    )

    @model_validator(mode="after")
    def _one_loop(self) -> Self:
        if self.rate and self.trace is not None:
            raise ValueError("--rate and --trace both say when requests start: use --speedup to hurry a trace")
        return self

    @property
    def open_loop(self) -> bool:
        """Whether requests start at given times rather than when others end."""
        return self.rate > 0 or self.trace is not None

    @property
    def origin(self) -> str:
        """The server's URL without a path."""
        return self.url.rstrip("/").removesuffix("/v1")
