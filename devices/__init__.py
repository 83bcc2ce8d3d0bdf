"""Device profiles, machines as a parameter (`hosts`), the CPUs of one, and its probe."""
