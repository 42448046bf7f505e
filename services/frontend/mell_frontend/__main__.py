"""`python -m mell_frontend`: builds one frontend from its settings and runs it until it is told to stop."""

import sys
from functools import partial

from mell_frontend.service import serve
from mell_frontend.settings import FrontendSettings
from mell_shared.ids import process_id
from mell_shared.log import configure_logging
from mell_shared.process import run_service


def main(arguments: list[str]) -> None:
    """Run a frontend with these flags until it is told to stop."""
    settings = FrontendSettings.from_command_line(arguments)
    frontend = process_id("frontend")
    configure_logging(settings.log_level, settings.log_format, service="frontend", process=frontend)
    run_service(partial(serve, settings, frontend))


if __name__ == "__main__":
    main(sys.argv[1:])
