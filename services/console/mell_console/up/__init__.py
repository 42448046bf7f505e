"""`mell up`: a whole stack on one machine, as child processes of one command."""
