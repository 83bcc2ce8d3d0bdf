"""A machine: what it has, how fast this one reads memory, and in what condition it is."""
