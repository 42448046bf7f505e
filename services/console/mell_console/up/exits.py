"""Waits for a process to end without reaping it."""

import asyncio
import os


async def exited(pid: int) -> None:
    """Return when process `pid` has ended, or at once if there is none.

    `asyncio`'s own wait also waits for the pipes, which a grandchild can hold open for ever.
    """
    loop = asyncio.get_running_loop()
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
