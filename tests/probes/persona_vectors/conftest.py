"""A tiny model with an adapter that changes something."""

import pytest
import torch
from tests import tiny


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path_factory.mktemp("dose") / "llama"))
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), adapter_name="tuned")
    return tiny.randomize_lora(adapted, 0.05).eval()
