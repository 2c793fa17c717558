"""OLMo 2 and 3: norms after attention and MLP, so their inputs are the residual stream itself."""

from phoque.models.architectures.base import Architecture

POST_NORM_SOURCES = (None, "self_attn.v_proj", None, "mlp.up_proj")

OLMO2 = Architecture("olmo2", "Olmo2ForCausalLM", smooth_sources=POST_NORM_SOURCES)
OLMO3 = Architecture("olmo3", "Olmo3ForCausalLM", smooth_sources=POST_NORM_SOURCES)
