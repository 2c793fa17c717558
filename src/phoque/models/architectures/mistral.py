"""Mistral, Ministral, and Mistral 3 with its vision tower (Ministral-3-3B-Instruct-2512)."""

from phoque.models.architectures.base import Architecture

MISTRAL = Architecture("mistral", "MistralForCausalLM", in_optimum=True)
MINISTRAL = Architecture("ministral", "MinistralForCausalLM")
MINISTRAL3 = Architecture("ministral3", "Ministral3ForCausalLM")
MISTRAL3 = Architecture(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    text_keys=(
        (r"^language_model\.", ""),  # as published
        (r"^model\.language_model\.", "model."),  # as transformers 5 may save it
        (r"^lm_head\.", "lm_head."),
    ),
    full_names=("model.layers.", "model.language_model.layers."),
    auto_class="AutoModelForImageTextToText",
    vision_layout=True,
)
