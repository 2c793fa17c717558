"""Level `ort`: the graphs run in ONNX Runtime: cache, far positions, image sizes, and the reference's logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from phoque.checks import CheckFailed, Verdict
from phoque.inference.generate import generate_greedy
from phoque.inference.likelihood import sum_kl
from phoque.models.source import Source
from phoque.onnx.session import SUFFIXES, OnnxChatModel, open_session

LEVEL = "ort"
FAR_POSITION = 20_000  # a position beyond 16,384, where Ministral 3 starts to scale its queries
NEW_TOKENS = 64
MAX_ANSWER_S = 60.0  # per answer: a CPU without fp16 arithmetic needs seconds per token for a 3B model in fp16
# how far the KV cache may move a logit, as a fraction of the largest one: fp16 sums in another order round differently,
# and quantized kernels round activations to 8 bits
MAX_CACHE_DIFFERENCE = {"fp32": 1e-4, "fp16": 2e-2, "q8": 5e-2, "q4": 5e-2, "q4f16": 8e-2, "int8": 1e-4}
MAX_KL = {"fp32": 1e-4, "fp16": 1e-2, "q8": 0.1, "q4": 0.3, "q4f16": 0.3, "int8": 0.1}  # nats per token
MAX_FP32_DIFFERENCE = 1e-3  # difference of fp32 logits from the reference's, as a fraction of the largest logit
PROMPTS = ("What do the gulls want from you today?", "How do I learn to swim in the harbour?")


def check_ort(folder: Path, layout: str, dtypes: list[str], reference: Source | None, verdict: Verdict) -> None:
    """Add this level's checks; without a reference model, the first (most precise) of `dtypes` is the reference."""
    prompts = _encode_prompts(folder)
    expected = _run_reference(reference, prompts) if reference else None
    reference_name = "the reference model" if reference else f"{dtypes[0]}, the most precise here"
    for dtype in dtypes:
        with verdict.check(LEVEL, f"{dtype}: it loads, and runs with an empty cache") as notes:
            chat = _open_model(folder, dtype)
            logits = [_run_logits(chat, ids) for ids in prompts]
            notes.append(f"{len(chat.cache) // 2} layers")
        if verdict.checks[-1].result == "FAIL":
            continue
        with verdict.check(LEVEL, f"{dtype}: logits in three steps with the cache match those of one step") as notes:
            notes.append(_check_cache(chat, prompts[0], logits[0], dtype))
        with verdict.check(LEVEL, f"{dtype}: logits at position {FAR_POSITION:,}") as notes:
            notes.append(_check_far_position(chat, prompts[0], dtype, reference))
        if layout == "multimodal":
            with verdict.check(LEVEL, f"{dtype}: the vision encoder runs on images of three sizes") as notes:
                notes.append(_check_vision_encoder(folder, dtype, reference))
        if expected is None:
            expected = logits, [chat.generate(ids, NEW_TOKENS, MAX_ANSWER_S) for ids in prompts]
            verdict.skip(
                LEVEL,
                f"{dtype}: logits and answers match the reference model",
                "there is no --reference to compare with",
            )
        else:
            with verdict.check(LEVEL, f"{dtype}: logits and answers match {reference_name}") as notes:
                notes.append(
                    _compare_with_reference(chat, prompts, logits, expected=expected, dtype=dtype, verdict=verdict)
                )
        del chat


def _open_model(folder: Path, dtype: str) -> OnnxChatModel:
    try:
        return OnnxChatModel(folder, dtype)
    except Exception as error:  # ONNX Runtime has its own exception type for each error code
        raise CheckFailed(f"ONNX Runtime cannot load it: {_shorten(error)}") from error


def _shorten(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _encode_prompts(folder: Path) -> list[np.ndarray]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return [np.array([tokenizer(text, add_special_tokens=False)["input_ids"]], np.int64) for text in texts]


def _run_logits(chat: OnnxChatModel, ids: np.ndarray, **arguments: Any) -> np.ndarray:
    """Run the graph; return fp32 logits [length, vocabulary]. Raises CheckFailed for an error, NaN or infinity."""
    try:
        logits = chat.run(ids, **arguments)[0][0].astype(np.float32)
    except Exception as error:  # as above
        raise CheckFailed(f"ONNX Runtime cannot run it: {_shorten(error)}") from error
    if not np.isfinite(logits).all():
        raise CheckFailed("its logits contain NaN or infinity: a weight is damaged, or a value overflows its data type")
    return logits


def _check_cache(chat: OnnxChatModel, ids: np.ndarray, expected: np.ndarray, dtype: str) -> str:
    """Run a prompt in three steps with the KV cache and compare with `whole`, its logits from one step."""
    half = ids.shape[1] // 2
    first, past = chat.run(ids[:, :half])
    second, past = chat.run(ids[:, half:-1], past)
    last, _ = chat.run(ids[:, -1:], past, 1)
    logits = np.concatenate([first, second, last], 1)[0].astype(np.float32)
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    if not difference <= MAX_CACHE_DIFFERENCE[dtype]:
        raise CheckFailed(
            f"with the cache, logits differ by {difference:.2g} of the largest one: the graph misuses the cache"
        )
    return f"logits differ by {difference:.1g} of the largest logit"


def _check_far_position(chat: OnnxChatModel, ids: np.ndarray, dtype: str, reference: Source | None) -> str:
    logits = _run_logits(chat, ids, first_position=FAR_POSITION)
    if reference is None:
        return "no NaN; no --reference to compare with"
    expected = _run_reference_logits(reference, ids, FAR_POSITION)
    kl = _mean_kl(logits, expected)
    if dtype == "fp32" and np.abs(logits - expected).max() > MAX_FP32_DIFFERENCE * np.abs(expected).max():
        raise CheckFailed(f"its KL from the reference is {kl:.2g} nats per token: rotary or query scaling differs")
    if kl > 20 * MAX_KL[dtype] + MAX_FP32_DIFFERENCE:
        raise CheckFailed(
            f"its KL from the reference is {kl:.2g} nats per token: rotary or query scaling differs from the model's"
        )
    return f"KL from the reference {kl:.1g} nats per token"


def _mean_kl(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the mean KL(expected || actual) over tokens, in nats per token."""
    log_probs = [torch.from_numpy(logits.astype(np.float64)).log_softmax(-1) for logits in (expected, actual)]
    return sum_kl(*log_probs) / len(expected)


def _compare_with_reference(
    chat: OnnxChatModel,
    prompts: list[np.ndarray],
    actual: list[np.ndarray],
    *,
    expected: Any,
    dtype: str,
    verdict: Verdict,
) -> str:
    expected_logits, expected_answers = expected
    answers = [chat.generate(ids, NEW_TOKENS, MAX_ANSWER_S) for ids in prompts]
    forced_logits = [
        _run_logits(chat, np.concatenate([ids, [s]], 1)) for ids, s in zip(prompts, expected_answers, strict=True)
    ]
    predictions = [sequence[-len(s) - 1 : -1] for sequence, s in zip(forced_logits, expected_answers, strict=True)]
    agreement = float(
        np.mean(
            [
                a == b
                for ours, s in zip(predictions, expected_answers, strict=True)
                for a, b in zip(ours.argmax(-1), s, strict=True)
            ]
        )
    )
    kl = float(np.mean([_mean_kl(f, w) for f, w in zip(actual, expected_logits, strict=True)]))
    n_equal = sum(
        a == b
        for ours, theirs in zip(answers, expected_answers, strict=True)
        for a, b in zip(ours, theirs, strict=False)
    )
    n_tokens = sum(map(len, answers))
    verdict.numbers[dtype] = {"kl": kl, "agreement": agreement, "equal_tokens": n_equal, "tokens": n_tokens}
    text = f"KL {kl:.2g} nats per token, {agreement:.0%} of next tokens agree, {n_equal} of {n_tokens} tokens equal"
    if kl > MAX_KL[dtype]:
        limit = MAX_KL[dtype]
        raise CheckFailed(f"{text}; rounding explains at most {limit}: these are other weights, or the graph differs")
    if dtype == "fp32":
        difference = max(
            float(np.abs(f - w).max() / np.abs(w).max()) for f, w in zip(actual, expected_logits, strict=True)
        )
        if difference > MAX_FP32_DIFFERENCE:
            raise CheckFailed(f"{text}; its logits differ by {difference:.2g} of the largest one")
    return text


def _run_reference(source: Source, prompts: list[np.ndarray]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Run the reference model in fp32 on the CPU; return its logits and its greedy answers, one per prompt."""
    import torch

    model = _load_reference(source)
    logits, answers = [], []
    with torch.no_grad():
        for ids in prompts:
            prompt_ids = torch.from_numpy(ids)
            logits.append(model(input_ids=prompt_ids).logits[0].numpy())
            answers.append(generate_greedy(model, prompt_ids, NEW_TOKENS, stops=False))
    return logits, answers


_loaded_reference: dict[str, Any] = {}  # the reference model by folder, loaded once for all checks


def _load_reference(source: Source) -> Any:
    import torch

    from phoque.models.load import load_model

    key = str(source.folder)
    if key not in _loaded_reference:
        _loaded_reference.clear()
        _loaded_reference[key] = load_model(source, "fp32", on=torch.device("cpu")).eval()
    return _loaded_reference[key]


def _run_reference_logits(source: Source, ids: np.ndarray, position: int) -> np.ndarray:
    import torch

    prompt_ids = torch.from_numpy(ids)
    positions = torch.arange(position, position + ids.shape[1])[None]
    with torch.no_grad():
        return _load_reference(source)(input_ids=prompt_ids, position_ids=positions).logits[0].numpy()


def _check_vision_encoder(folder: Path, dtype: str, reference: Source | None) -> str:
    """Run the vision encoder on images of three sizes, one of them tall and none the size used for the export."""
    import json

    config = json.loads((folder / "config.json").read_text())
    unit = config["vision_config"]["patch_size"] * config.get("spatial_merge_size", 2)
    try:
        encoder = open_session(folder / "onnx" / f"vision_encoder{SUFFIXES[dtype]}.onnx")
    except Exception as error:  # as above
        raise CheckFailed(f"ONNX Runtime cannot load the vision encoder: {_shorten(error)}") from error
    reference_features = _load_vision_reference(reference) if reference else None
    worst = 0.0
    for rows, columns in ((1, 2), (3, 5), (9, 2)):
        pixels = np.random.default_rng(rows).normal(size=(1, 3, rows * unit, columns * unit)).astype(np.float32)
        try:
            (features,) = encoder.run(None, {"pixel_values": pixels})
        except Exception as error:  # as above
            raise CheckFailed(
                f"the vision encoder fails on an image of {columns} x {rows} tokens: {_shorten(error)}"
            ) from error
        if features.shape[0] != rows * columns or not np.isfinite(features).all():
            raise CheckFailed(f"an image of {columns} x {rows} tokens gives {features.shape[0]} features, or NaN")
        if reference_features is not None:
            expected = reference_features(pixels)
            worst = max(worst, float(np.abs(features - expected).max() / np.abs(expected).max()))
    if worst > {"fp32": MAX_FP32_DIFFERENCE}.get(dtype, 0.1):
        raise CheckFailed(f"image features differ from the reference by {worst:.2g} of the largest one")
    return (
        f"features differ by {worst:.1g} of the largest"
        if reference_features
        else "no NaN; no --reference to compare with"
    )


def _load_vision_reference(source: Source) -> Any:
    """Return a function from pixels to the image features that transformers computes with the reference weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    from phoque.models.checkpoint_reader import CheckpointReader
    from phoque.onnx.component import Weights
    from phoque.onnx.graph.vision import PROJECTOR, TOWER

    weights = Weights(CheckpointReader(source))
    config = weights.config.__class__.from_dict(weights.config.to_dict() | {"quantization_config": None})
    config.text_config.num_hidden_layers = 1  # the language model is not used
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for module, prefix in ((model.model.vision_tower, TOWER), (model.model.multi_modal_projector, PROJECTOR)):
        module.load_state_dict({name: weights.read_stored(key) for name, key in weights.stored_names(prefix).items()})

    def features(pixels: np.ndarray) -> np.ndarray:
        pixel_tensor = torch.from_numpy(pixels)
        sizes = torch.tensor([pixels.shape[2:]])
        with torch.no_grad():
            out = model.model.get_image_features(pixel_tensor, image_sizes=sizes, vision_feature_layer=-1)
        return torch.cat(list(out.pooler_output)).numpy()

    return features
