"""Run llama.cpp's own converter: CONVERTER_FOLDER MODEL OUT DTYPE.

It knows pre-tokenizers by a hash of the tokens of one text; tiny tokenizers are in no such list.
"""

import runpy
import sys

converter, model, out, dtype = sys.argv[1:]
sys.path[:0] = [converter, f"{converter}/gguf-py"]
from conversion.base import TextModel  # noqa: E402 - of llama.cpp

TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", dtype]
runpy.run_path(f"{converter}/convert_hf_to_gguf.py", run_name="__main__")
