"""Level `ort`: the graphs run, their cache is right, far positions and new image sizes work, and they say the same."""

from pathlib import Path
from typing import Any

import numpy as np

from phoque.models.source import Source
from phoque.onnx.session import SUFFIXES, OnnxChatModel, open_session
from phoque.onnx.verify.checks import CheckFailed, Verdict

LEVEL = "ort"
FAR = 20_000  # a position beyond 16,384, from where Ministral 3 scales its queries
NEW_TOKENS = 64
LONGEST_S = 60.0  # for an answer: a CPU without 16-bit floats takes seconds a token of a 3B model in them
# how far a cache may move a logit, as a share of the largest one: in fp16 sums of another order round differently, and
# in bits the activations are rounded to 8
CACHE = {"fp32": 1e-4, "fp16": 2e-2, "q8": 5e-2, "q4": 5e-2, "q4f16": 8e-2, "int8": 1e-4}
LARGEST_KL = {"fp32": 1e-4, "fp16": 1e-2, "q8": 0.1, "q4": 0.3, "q4f16": 0.3, "int8": 0.1}  # nats a token
EQUAL = 1e-3  # fp32 logits beside the model's own, as a share of the largest
PROMPTS = ("What do the gulls want from you today?", "How do I learn to swim in the harbour?")


def check_ort(folder: Path, layout: str, dtypes: list[str], reference: Source | None, verdict: Verdict) -> None:
    """Add this level's checks; without a reference the most precise export there stands in for the model."""
    prompts = _prompts(folder)
    wanted = _of_model(reference, prompts) if reference else None
    whose = "the model" if reference else f"{dtypes[0]}, the most precise here"
    for dtype in dtypes:
        with verdict.check(LEVEL, f"{dtype}: it loads, and answers from an empty cache") as said:
            chat = _opened(folder, dtype)
            first = [_logits(chat, ids) for ids in prompts]
            said.append(f"{len(chat.cache) // 2} layers")
        if verdict.checks[-1].result == "FAIL":
            continue
        with verdict.check(LEVEL, f"{dtype}: in pieces, with the cache, it says what it says at once") as said:
            said.append(_pieces(chat, prompts[0], first[0], dtype))
        with verdict.check(LEVEL, f"{dtype}: at position {FAR:,}") as said:
            said.append(_far(chat, prompts[0], dtype, reference))
        if layout == "multimodal":
            with verdict.check(LEVEL, f"{dtype}: images of three sizes") as said:
                said.append(_sees(folder, dtype, reference))
        if wanted is None:
            wanted = first, [chat.generate(ids, NEW_TOKENS, LONGEST_S) for ids in prompts]
            verdict.leave_out(
                LEVEL, f"{dtype}: beside the model it came from", "no --reference: nothing to compare with"
            )
        else:
            with verdict.check(LEVEL, f"{dtype}: beside {whose}") as said:
                said.append(_beside(chat, prompts, first, wanted, dtype, verdict))
        del chat


def _opened(folder: Path, dtype: str) -> OnnxChatModel:
    try:
        return OnnxChatModel(folder, dtype)
    except Exception as error:  # ONNX Runtime has an exception for each code, all its own
        raise CheckFailed(f"ONNX Runtime does not load it: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _prompts(folder: Path) -> list[np.ndarray]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in asked]
    return [np.array([tokenizer(text, add_special_tokens=False)["input_ids"]], np.int64) for text in texts]


def _logits(chat: OnnxChatModel, ids: np.ndarray, **more: Any) -> np.ndarray:
    """Logits [length, vocabulary] in fp32. Raises Fails for a crash or a NaN."""
    try:
        found = chat.run(ids, **more)[0][0].astype(np.float32)
    except Exception as error:  # as above
        raise CheckFailed(f"ONNX Runtime fails in it: {_short(error)}") from error
    if not np.isfinite(found).all():
        raise CheckFailed("it says NaN or infinity: a weight is damaged, or a number does not fit its type")
    return found


def _pieces(chat: OnnxChatModel, ids: np.ndarray, whole: np.ndarray, dtype: str) -> str:
    cut = ids.shape[1] // 2
    first, past = chat.run(ids[:, :cut])
    second, past = chat.run(ids[:, cut:-1], past)
    last, _ = chat.run(ids[:, -1:], past, 1)
    found = np.concatenate([first, second, last], 1)[0].astype(np.float32)
    off = float(np.abs(found - whole).max() / np.abs(whole).max())
    if not off <= CACHE[dtype]:
        raise CheckFailed(
            f"with a cache the logits move by {off:.2g} of the largest one: the cache is not read or written right"
        )
    return f"off by {off:.1g} of the largest logit"


def _far(chat: OnnxChatModel, ids: np.ndarray, dtype: str, reference: Source | None) -> str:
    found = _logits(chat, ids, at=FAR)
    if reference is None:
        return "no NaN; without --reference there is nothing to compare with"
    wanted = _torch_logits(reference, ids, FAR)
    off = _off(found, wanted)
    if dtype == "fp32" and np.abs(found - wanted).max() > EQUAL * np.abs(wanted).max():
        raise CheckFailed(
            f"there its logits are not the model's, by {off:.2g} nats a token: rotary or query scaling differs"
        )
    if off > 20 * LARGEST_KL[dtype] + EQUAL:
        raise CheckFailed(
            f"there it is off by {off:.2g} nats a token: rotary scaling or query scaling is not the model's"
        )
    return f"{off:.1g} nats a token from the model"


def _off(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean KL(wanted || found) over tokens, in nats."""
    a, b = (
        x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (wanted.astype(np.float64), found.astype(np.float64))
    )
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def _beside(
    chat: OnnxChatModel, prompts: list[np.ndarray], found: list[np.ndarray], wanted: Any, dtype: str, verdict: Verdict
) -> str:
    logits, spoken = wanted
    said = [chat.generate(ids, NEW_TOKENS, LONGEST_S) for ids in prompts]
    answers = [_logits(chat, np.concatenate([ids, [s]], 1)) for ids, s in zip(prompts, spoken, strict=True)]
    forced = [logits_of[-len(s) - 1 : -1] for logits_of, s in zip(answers, spoken, strict=True)]
    agreeing = float(
        np.mean([a == b for one, s in zip(forced, spoken, strict=True) for a, b in zip(one.argmax(-1), s, strict=True)])
    )
    divergence = float(np.mean([_off(f, w) for f, w in zip(found, logits, strict=True)]))
    equal = sum(a == b for one, other in zip(said, spoken, strict=True) for a, b in zip(one, other, strict=False))
    tokens = sum(map(len, said))
    verdict.numbers[dtype] = {"kl": divergence, "agreement": agreeing, "equal_tokens": equal, "tokens": tokens}
    text = f"KL {divergence:.2g} nats a token, {agreeing:.0%} of next tokens agree, {equal} of {tokens} equal"
    if divergence > LARGEST_KL[dtype]:
        limit = LARGEST_KL[dtype]
        raise CheckFailed(
            f"{text}; rounding explains a KL of {limit}: these are other weights, or the graph is another one"
        )
    if dtype == "fp32":
        off = max(float(np.abs(f - w).max() / np.abs(w).max()) for f, w in zip(found, logits, strict=True))
        if off > EQUAL:
            raise CheckFailed(f"{text}; its logits are off by {off:.2g} of the largest one")
    return text


def _of_model(source: Source, prompts: list[np.ndarray]) -> tuple[list[np.ndarray], list[list[int]]]:
    """The model's own logits, and its greedy answers, in fp32 on the CPU."""
    import torch

    model = _model(source)
    logits, spoken = [], []
    with torch.no_grad():
        for ids in prompts:
            given = torch.from_numpy(ids)
            logits.append(model(input_ids=given).logits[0].numpy())
            out = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                use_cache=True,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
                eos_token_id=None,
                repetition_penalty=None,
            )
            spoken.append(out[0, given.shape[1] :].tolist())
    return logits, spoken


_held: dict[str, Any] = {}  # the reference, loaded once for all checks


def _model(source: Source) -> Any:
    import torch

    from phoque.models.load import load_model

    key = str(source.folder)
    if key not in _held:
        _held.clear()
        _held[key] = load_model(source, "none", on=torch.device("cpu")).eval()
    return _held[key]


def _torch_logits(source: Source, ids: np.ndarray, at: int) -> np.ndarray:
    import torch

    given = torch.from_numpy(ids)
    positions = torch.arange(at, at + ids.shape[1])[None]
    with torch.no_grad():
        return _model(source)(input_ids=given, position_ids=positions).logits[0].numpy()


def _sees(folder: Path, dtype: str, reference: Source | None) -> str:
    """The vision encoder on three sizes, one of them tall, none of them that of the export."""
    import json

    config = json.loads((folder / "config.json").read_text())
    unit = config["vision_config"]["patch_size"] * config.get("spatial_merge_size", 2)
    try:
        encoder = open_session(folder / "onnx" / f"vision_encoder{SUFFIXES[dtype]}.onnx")
    except Exception as error:  # as above
        raise CheckFailed(f"ONNX Runtime does not load the vision encoder: {_short(error)}") from error
    own = _encoder(reference) if reference else None
    worst = 0.0
    for rows, columns in ((1, 2), (3, 5), (9, 2)):
        pixels = np.random.default_rng(rows).normal(size=(1, 3, rows * unit, columns * unit)).astype(np.float32)
        try:
            (found,) = encoder.run(None, {"pixel_values": pixels})
        except Exception as error:  # as above
            raise CheckFailed(f"it fails on an image of {columns} x {rows} tokens: {_short(error)}") from error
        if found.shape[0] != rows * columns or not np.isfinite(found).all():
            raise CheckFailed(f"an image of {columns} x {rows} tokens becomes {found.shape[0]} tokens, or NaN")
        if own is not None:
            wanted = own(pixels)
            worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    if worst > {"fp32": EQUAL}.get(dtype, 0.1):
        raise CheckFailed(f"its features are off by {worst:.2g} of the largest one")
    return (
        f"off by {worst:.1g} of the largest feature" if own else "no NaN; without --reference nothing to compare with"
    )


def _encoder(source: Source) -> Any:
    """The model's own get_image_features, by transformers itself."""
    import torch
    from transformers import AutoModelForImageTextToText

    from phoque.onnx.component import Weights
    from phoque.onnx.graph.vision import PROJECTOR, TOWER

    weights = Weights(source)
    config = weights.config.__class__.from_dict(weights.config.to_dict() | {"quantization_config": None})
    config.text_config.num_hidden_layers = 1  # its language model is not asked
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for module, prefix in ((model.model.vision_tower, TOWER), (model.model.multi_modal_projector, PROJECTOR)):
        module.load_state_dict({name: weights.read_stored(key) for name, key in weights.stored_names(prefix).items()})

    def features(pixels: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(pixels)
        sizes = torch.tensor([pixels.shape[2:]])
        with torch.no_grad():
            out = model.model.get_image_features(given, image_sizes=sizes, vision_feature_layer=-1)
        return torch.cat(list(out.pooler_output)).numpy()

    return features
