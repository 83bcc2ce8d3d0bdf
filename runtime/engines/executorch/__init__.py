"""ExecuTorch's runtime, through its Python binding."""
