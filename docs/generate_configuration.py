"""Writes `configuration.md` from the settings classes themselves: `make docs`; a test holds the two together."""

from collections.abc import Iterator
from pathlib import Path

from mell_console.bench.settings import BenchSettings
from mell_console.scaler.settings import ScalerSettings
from mell_console.up.settings import UpSettings
from mell_frontend.settings import FrontendSettings
from mell_gpu_worker.settings import WorkerSettings
from mell_scheduler.settings import SchedulerSettings
from mell_shared.settings import CommandLineSettings, ServiceSettings, SettingInfo

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

Every setting is a flag of its command, a `MELL_` variable, and has a default; the first of these that is given wins.
`--help` of each command shows the same. This page is written from the code by `make docs`.

"""

SECTIONS: tuple[tuple[str, str, type[CommandLineSettings]], ...] = (
    ("`mell up`", "A whole stack on one machine. Variables of the services below are passed on to them.", UpSettings),
    ("Every service", "Taken by `mell serve frontend`, `scheduler` and `gpu-worker` alike.", ServiceSettings),
    ("`mell serve frontend`", "The OpenAI-compatible HTTP service.", FrontendSettings),
    ("`mell serve scheduler`", "Placement.", SchedulerSettings),
    ("`mell serve gpu-worker`", "An engine and its KV memory.", WorkerSettings),
    ("`mell scaler`", "Starts and stops workers by a command of yours: [scaling](scaling.md).", ScalerSettings),
    ("`mell bench`", "A load generator for any OpenAI-compatible server.", BenchSettings),
)


def page() -> str:
    """Return the whole page as Markdown."""
    return INTRODUCTION + "\n".join("\n".join(_section(*section)) for section in SECTIONS)


def _section(title: str, about: str, settings: type[CommandLineSettings]) -> Iterator[str]:
    own = settings is ServiceSettings or not issubclass(settings, ServiceSettings)
    known = set() if own else set(ServiceSettings.model_fields)
    yield from (f"## {title}", "", about, "", "| flag | variable | type | default | |", "|---|---|---|---|---|")
    yield from (_row(setting) for setting in settings.listing() if setting.name not in known)
    yield ""


def _row(setting: SettingInfo) -> str:
    default = setting.default.removeprefix("default ").replace("no default", "")
    cells = (f"`{setting.flag}`", f"`{setting.variable}`", setting.kind, default, setting.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
