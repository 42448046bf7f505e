"""A whole cluster in one thread: the real cores, a virtual clock, a broker and links that fail by a seed."""
