"""This machine: what it has, how fast it reads memory, and in what condition it is."""
