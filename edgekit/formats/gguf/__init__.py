"""GGUF: `file.py` reads any file's head, `writer.py` streams one, `vocabulary.py` tokenizes."""
