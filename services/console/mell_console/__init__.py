"""The `mell` command: composes the services, and talks to a running stack."""
