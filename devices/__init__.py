"""Device profiles, the CPUs that this process may use, and the probe of this machine."""
