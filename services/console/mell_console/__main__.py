"""`python -m mell_console` is `mell`."""

from mell_console.cli import main

if __name__ == "__main__":
    main()
