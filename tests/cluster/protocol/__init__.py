"""The migration protocol, exhaustively: every order of events within bounds, over the real tables and arbiter rules."""
