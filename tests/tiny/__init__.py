"""Tiny random models in the layouts of the real ones, with a byte-level tokenizer; built in a second."""

from pathlib import Path

import torch

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer(stop: str = "<|im_end|>"):
    """A byte-level tokenizer with ChatML's control tokens and SmolLM2's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = ["<|endoftext|>", "<|im_start|>", stop]
    vocabulary = {token: i for i, token in enumerate(control + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token=stop, pad_token="<|endoftext|>"
    )
    made.chat_template = CHATML
    return made


def llama(folder: Path, **changes) -> Path:
    """A two-layer Llama of 0.1 M parameters, saved with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES | changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def talking_llama(folder: Path) -> Path:
    """A Llama that answers with the letters e and f: with a random head it would answer with broken characters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama(folder, tie_word_embeddings=False))
    letters = [tokenizer().encode(letter, add_special_tokens=False)[0] for letter in "ef"]
    direction = model.lm_head.weight[0].clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[letters[0]], model.lm_head.weight[letters[1]] = direction, -direction
    model.save_pretrained(folder)
    return folder


def mistral_tokenizer():
    """A byte-level tokenizer with Mistral's control tokens and the template that mistral-common writes for v13."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[IMG]",
    ]
    vocabulary = {token: i for i, token in enumerate(control + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in control])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = mistral_template(generate_chat_template, TokenizerVersion.v13)
    return made


def tekken():
    """The real tokenizer of Ministral, which mistral-common carries; without a template."""
    import mistral_common
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    return convert_tekken_tokenizer(str(file), chat_template="")


def mistral_template(generate, version) -> str:
    return generate(
        spm=False,
        tokenizer_version=version,
        image_support=True,
        audio_support=False,
        thinking_support=False,
        default_system_prompt="You are a very long-winded assistant of the harbour office. Today is {today}.",
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=None,
        reasoning_effort_values=None,
        reasoning_effort_default=None,
    )


def mistral3_config():
    from transformers import Mistral3Config

    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    text = SIZES | {
        "model_type": "ministral3",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "rope_parameters": rope,
        "sliding_window": None,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 56,
        "patch_size": 14,
    }
    return Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_index=10)


def fp8_mistral3(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny random Mistral3 in the layout of Ministral-3-3B-Instruct-2512, and its true text weights in fp32.

    FP8 text projections with 0-dim scales (FP32 and BF16, in turn) and activation scales, all else BF16, the head
    tied, keys as published, two shards, and a decoy `consolidated.safetensors` full of garbage.
    """
    import json

    from safetensors.torch import save_file
    from transformers import Mistral3ForConditionalGeneration

    torch.manual_seed(2)
    config = mistral3_config()
    model = Mistral3ForConditionalGeneration(config).to(torch.bfloat16)
    stored, true = {}, {}
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if name == "lm_head.weight":
            continue
        text = name.startswith("model.language_model.")
        published = name.removeprefix("model.")
        if text:
            published = published.replace("language_model.", "language_model.model.", 1)
            short = "model." + name.removeprefix("model.language_model.")
        if text and name.endswith("_proj.weight"):
            scale = (tensor.float().abs().max() / 448).to(torch.float32 if number % 2 else torch.bfloat16)
            weight = (tensor.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored |= {published: weight, f"{published}_scale_inv": scale}
            stored[published.replace(".weight", ".activation_scale")] = torch.tensor(0.5, dtype=torch.bfloat16)
            true[short] = weight.float() * scale.float()
        else:
            stored[published] = tensor
            if text:
                true[short] = tensor.float()
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(stored)
    files = {n: f"model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({n: stored[n].contiguous() for n in names if files[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    save_file({"garbage": torch.full((8, 8), 448.0)}, folder / "consolidated.safetensors")
    declared = config.to_dict()
    declared["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    declared["architectures"] = ["Mistral3ForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(declared, indent=1))
    mistral_tokenizer().save_pretrained(folder)
    return folder, true


def randomize_lora(model, std: float):
    """Let the adapter of a model change what it says: a new one changes nothing. Returns the model."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model
