"""Device profiles, probing of the local machine, memory and speed prediction."""
