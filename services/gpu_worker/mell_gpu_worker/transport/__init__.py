"""How KV blocks get from one worker's memory into another's: one port, three transports.

`base` is the port; `link` is what a transport has to provide below it; `outgoing`, `incoming` and `reception` are
the protocol that all transports share; `memory`, `tcp` and `ucx` carry it. Nothing here knows sequences,
migrations, torch or the broker: only buffers, secrets and bytes.
"""
