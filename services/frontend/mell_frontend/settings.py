"""The frontend's settings: where it listens, what it serves, who may ask, and how much at once."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from mell_shared.models import DEFAULT_MODEL, default_model_dir
from mell_shared.settings import ServiceSettings

StringList = Annotated[list[str], NoDecode]
"""Several values: the flag repeated, or one text separated by commas, or a JSON list."""


class FrontendSettings(ServiceSettings):
    """What a frontend needs to know."""

    model_config = SettingsConfigDict(cli_prog_name="mell serve frontend")

    host: str = Field("127.0.0.1", description="Interface to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    models: StringList = Field(
        [DEFAULT_MODEL],
        min_length=1,
        description="Models to serve, each `MODEL` or `NAME=MODEL`, the name as its workers have it; repeatable.",
    )
    model_dir: Path = Field(default_factory=default_model_dir, description="Folder that pulled models are kept in.")
    max_model_len: int | None = Field(None, ge=1, description="Context in tokens; default: what the model says.")
    api_keys: StringList = Field(
        [],
        repr=False,
        description="Bearer keys that may ask, or `sha256:HEX` of them; none, and no file: everyone may.",
    )
    api_keys_file: Path | None = Field(
        None, description="File of keys with names and limits (`mell key`); read again when it changes."
    )
    requests_per_minute: int = Field(0, ge=0, lt=2**31, description="Of each key without its own limit; 0: any.")
    tokens_per_minute: int = Field(
        0, ge=0, lt=2**31, description="Of each key without its own limit, prompt and output; 0: any."
    )
    admin_key: str = Field(
        "",
        repr=False,
        description="Bearer key for `/admin`, or `sha256:HEX` of it; none: only this machine itself may ask there.",
    )
    live_interval_s: float = Field(
        1.0, ge=0.2, le=10, description="Time between two states of the cluster that the dashboard shows."
    )
    cors_origins: StringList = Field([], description="Origins that browsers may ask from; `*`: all.")
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Largest request body.")
    max_header_bytes: int = Field(64 * 2**10, ge=1024, description="Largest sum of a request's headers.")
    max_connections: int = Field(8192, ge=1, description="Most HTTP connections open at once; more get a 503.")
    read_timeout_s: float = Field(60.0, gt=0, description="Longest wait for a request's whole body.")
    write_timeout_s: float = Field(60.0, gt=0, description="Longest wait for a client that does not read its answer.")
    max_choices: int = Field(128, ge=1, description="Most choices of one request, over all its prompts.")
    max_stop: int = Field(16, ge=1, description="Most stop strings of one request.")
    max_stop_chars: int = Field(256, ge=1, description="Longest stop string.")
    max_logit_bias: int = Field(1024, ge=0, description="Most `logit_bias` entries of one request.")
    max_tools: int = Field(128, ge=1, description="Most tools of one request.")

    max_open_sequences: int = Field(4096, ge=1, description="Most choices of all requests open at once.")
    place_reply_s: float = Field(2.0, gt=0, le=60, description="Longest wait for one answer of the scheduler.")
    place_deadline_s: float = Field(15.0, gt=0, description="A scheduler silent this long makes requests fail.")
    submit_reply_s: float = Field(5.0, gt=0, le=60, description="Longest wait for a worker to take a sequence.")
    worker_silence_s: float = Field(
        5.0, gt=0, description="A worker silent this long loses its sequences to others; at least three statuses."
    )
    broker_lost_s: float = Field(60.0, gt=0, description="Streams fail after this long without the broker.")
    events: Literal["on", "off"] = Field("on", description="Events for other systems on JetStream; also at schedulers.")
    stop_deadline_s: float = Field(30.0, ge=0, description="After SIGTERM, the longest wait for running streams.")

    @field_validator("models", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [part.strip() for part in value.split(",") if part.strip()]
