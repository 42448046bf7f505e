"""Events for other systems: what they say, how they are numbered and written, and the stream that keeps them."""
