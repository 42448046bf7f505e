"""What crosses a process boundary: messages, subjects, codec, bus, actor, clock, settings, log; no service logic."""
