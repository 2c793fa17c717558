"""Mistral, Ministral, and Mistral 3 with its vision tower (Ministral-3-3B-Instruct-2512, Mistral Small 3.1 and 3.2)."""

from phoque.models.architectures.base import VISION_FULL_NAMES, VISION_TEXT_KEYS, Architecture, VisionTower

MISTRAL = Architecture("mistral", "MistralForCausalLM", in_optimum=True)
MINISTRAL = Architecture("ministral", "MinistralForCausalLM")
MINISTRAL3 = Architecture("ministral3", "Ministral3ForCausalLM")
MISTRAL3 = Architecture(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    text_keys=VISION_TEXT_KEYS,
    full_names=VISION_FULL_NAMES,
    auto_class="AutoModelForImageTextToText",
    vision=VisionTower(
        projector=("transformers.models.mistral3.modeling_mistral3", "Mistral3MultiModalProjector"),
        processor="PixtralProcessor",
        image_processor="PixtralImageProcessor",
        image_tokens={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    ),
)
