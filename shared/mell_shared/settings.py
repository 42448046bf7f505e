"""Settings: every one has a default, a `MELL_` variable and a `--flag`; a wrong one is told in one line."""

import sys
from typing import Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError


class CommandLineSettings(BaseSettings):
    """Settings that come from flags, then variables, then defaults. Subclasses set `cli_prog_name`."""

    model_config = SettingsConfigDict(env_prefix="MELL_", extra="ignore", cli_kebab_case=True, cli_prog_name="mell")

    @classmethod
    def from_command_line(cls, arguments: list[str]) -> Self:
        """Return settings from flags, then variables, then defaults; print one line and exit 2 if one is wrong."""
        try:
            return cls(_cli_parse_args=arguments)
        except (ValidationError, SettingsError) as error:
            sys.stderr.write(f"mell: {_one_line(error, cls.model_config.get('env_prefix', ''))}\n")
            raise SystemExit(2) from error


class ServiceSettings(CommandLineSettings):
    """What every service needs to know."""

    nats_url: str = Field("nats://127.0.0.1:4222", description="Broker, with user and password if it asks for them.")
    subject_prefix: str = Field("mell", pattern=r"^[A-Za-z0-9_-]+$", description="First token of every subject.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, else json."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus metrics and health over HTTP; 0: none.")
    metrics_host: str = Field("127.0.0.1", description="Interface of the metrics port.")


def _one_line(error: ValidationError | SettingsError, prefix: str) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    fault = error.errors(include_url=False)[0]
    name = "_".join(str(part) for part in fault["loc"]) or "settings"
    flag = name.replace("_", "-")
    return f"--{flag} (or {prefix}{name.upper()}): {fault['msg']}, got {fault['input']!r}"
