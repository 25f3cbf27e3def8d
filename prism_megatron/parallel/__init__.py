"""Process groups, collectives and the CPU backend."""
