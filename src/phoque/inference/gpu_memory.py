"""The free memory of the GPU, and what a row of a batch takes of it."""

from typing import Any

import torch

from phoque.inference.residual_stream import unwrap_model
from phoque.models.config import head_dim_of

MEMORY_SHARE = 0.5  # of the free memory that a batch may take, as estimated


def measure_available_bytes() -> float:
    """The memory that a batch may take: a share of what is free, or reserved by torch and unused."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return MEMORY_SHARE * (torch.cuda.mem_get_info()[0] + unused)


def estimate_cache_bytes(model: Any) -> int:
    """The bytes of one token's keys and values in all blocks."""
    config = unwrap_model(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim_of(config) * _get_value_size(model)


def estimate_row_bytes(model: Any, prompt: int, tokens: int) -> int:
    """The bytes that one row of a batch takes: keys and values, the activations of the prompt, and the logits.

    At the shape of Ministral 3 3B with 64 and 40 tokens it gives 18 MB; 17 MB were measured.
    """
    config = unwrap_model(model).config.get_text_config()
    activations = prompt * _get_value_size(model) * (2 * config.intermediate_size + 6 * config.hidden_size)
    logits = config.vocab_size * 16  # in the model's precision and in fp32, and their probabilities
    return estimate_cache_bytes(model) * (prompt + tokens) + activations + logits


def _get_value_size(model: Any) -> int:
    return unwrap_model(model).get_input_embeddings().weight.dtype.itemsize
