"""A small language model of transformers' own, and tokens for it."""

import torch
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM


def make_lm(seed: int = 0, tied: bool = True) -> Lfm2ForCausalLM:
    torch.manual_seed(seed)
    config = Lfm2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return Lfm2ForCausalLM(config)


def tokens(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 96, (rows, length), generator=generator)
