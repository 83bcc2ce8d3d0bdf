"""Text from an engine: sampling, generation, chat."""
