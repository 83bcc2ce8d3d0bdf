"""The two tensors that recipes and quantizers know by name."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
