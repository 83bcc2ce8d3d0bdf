"""The bytes of files: read and written here, without an engine and without a torch model."""
