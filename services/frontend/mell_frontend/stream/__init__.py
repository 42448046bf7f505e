"""The pure core of a stream: who owns each sequence, in which generation, and which tokens were accepted."""
