// The chat page. /api/info says what it talks to: {engine, name, models, system, sampling, ...}. An engine is one of
// - server: the model runs in phoque, and answers over server-sent events;
// - onnx: an ONNX export in Transformers.js, in a worker of this page;
// - gguf: a GGUF file in wllama, in this page.
import { openGguf } from "./engine_gguf.mjs";
import { openOnnx } from "./engine_onnx.mjs";
import { openServer } from "./engine_server.mjs";

const $ = (id) => document.getElementById(id);
const info = await (await fetch("/api/info")).json();
const open = { server: openServer, onnx: openOnnx, gguf: openGguf }[info.engine];
const labels = info.models ?? ["tuned"];
let turns = []; // {question, answers by label}
let tries = 0; // another try draws other tokens
let engine;
let stopped = false;

$("name").textContent = document.title = info.name;
document.body.classList.toggle("several", labels.length > 1);
$("system").value = info.system ?? "";
$("temperature").value = info.sampling.temperature;
$("tokens").value = info.sampling.tokens;
$("seed").value = info.sampling.seed;
for (const choice of info.choices ?? []) $("dtype").add(new Option(choice, choice));
$("precision").hidden = (info.choices ?? []).length < 2;
$("where").hidden = info.engine !== "onnx";
$("seed").parentElement.hidden = info.engine === "onnx"; // Transformers.js draws without a seed
const adapter = info.engine === "onnx" ? await navigator.gpu?.requestAdapter().catch(() => null) : null;
if (adapter) $("device").add(new Option("WebGPU", "webgpu"));
const fits = (dtype) =>
  $("device").value === "wasm" || !dtype.includes("f") || dtype === "fp32" || adapter.features.has("shader-f16");

function say(text) { $("state").textContent = text; }

function setBusy(busy) {
  $("text").disabled = $("send").disabled = $("reset").disabled = $("system").disabled = busy;
  $("again").disabled = busy || !turns.length;
  $("send").hidden = busy && Boolean(engine);
  $("stop").hidden = !busy || !engine;
  if (!busy) $("text").focus({ preventScroll: true });
}

function add(role, text, parent = $("turns"), label = "") {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.textContent = text; // the model's output is never inserted as HTML
  if (label) element.dataset.label = label;
  parent.append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function fail(error) {
  $("progress").hidden = true;
  add("error", String(error?.message ?? error));
  say("failed");
}

function history(label) {
  const system = $("system").value;
  const hasSystem = system || info.system === ""; // an empty one that was asked for is one
  const messages = hasSystem ? [{ role: "system", content: system }] : [];
  for (const { question, answers } of turns) {
    if (!(label in answers)) continue; // it was stopped before its turn
    messages.push({ role: "user", content: question }, { role: "assistant", content: answers[label] });
  }
  return messages;
}

async function answer(question) {
  const row = document.createElement("div");
  row.className = "answers";
  if (labels.length > 1) $("turns").append(row);
  const answers = {};
  stopped = false;
  setBusy(true);
  const summaries = [];
  for (const label of labels) {
    const element = labels.length > 1 ? add("assistant", "", row, label) : add("assistant", "");
    const start = performance.now();
    let first = 0;
    let count = 0;
    say("reading the prompt");
    const clock = setInterval(() => {
      if (!count) say(`reading the prompt, ${((performance.now() - start) / 1e3).toFixed(0)} s`);
    }, 1000);
    const show = (piece) => {
      count += 1;
      first ||= performance.now();
      element.textContent += piece;
      element.scrollIntoView({ block: "end" });
      const speed = count > 1 ? (1e3 * (count - 1)) / (performance.now() - first) : 0;
      say(`${count} tokens, ${speed.toFixed(1)} per second`);
    };
    try {
      const request = { messages: [...history(label), { role: "user", content: question }], model: label,
        temperature: Number($("temperature").value), tokens: Number($("tokens").value), seed: Number($("seed").value),
        number: turns.length + 1000 * tries, top_p: info.sampling.top_p, penalty: info.sampling.penalty };
      const done = await engine.answer(request, show);
      element.textContent = answers[label] = done.text;
      const seconds = (performance.now() - first) / 1e3;
      const speed = done.tokens > 1 && seconds > 0 ? (done.tokens - 1) / seconds : 0;
      const wait = first ? (first - start) / 1e3 : 0;
      summaries.push(`${labels.length > 1 ? `${label}: ` : ""}${done.tokens} tokens, ${speed.toFixed(1)} per second, ` +
        `the first after ${wait.toFixed(2)} s${done.finish_reason === "length" ? ", cut off" : ""}`);
    } catch (error) {
      answers[label] = element.textContent;
      if (!stopped) fail(error);
      else summaries.push(`stopped after ${count} tokens`);
    }
    clearInterval(clock);
    if (stopped) break;
  }
  turns.push({ question, answers });
  if (summaries.length) say(summaries.join("; "));
  setBusy(false);
}

async function load() {
  engine?.close();
  engine = undefined;
  setBusy(true);
  const dtype = $("dtype").value;
  if (info.engine === "onnx" && !fits(dtype))
    return fail("This precision needs shader-f16, which this GPU lacks: choose another.");
  say("starting");
  const start = performance.now();
  const progress = (loaded, total) => {
    $("progress").hidden = false;
    $("progress").value = total ? loaded / total : 0;
    say(`loading ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`);
  };
  try {
    engine = await open({ ...info, dtype, device: $("device").value }, progress);
    $("progress").hidden = true;
    say(`loaded in ${((performance.now() - start) / 1e3).toFixed(1)} s`);
    setBusy(false);
  } catch (error) {
    fail(error);
  }
}

function forget() {
  turns = [];
  $("turns").replaceChildren();
}

$("dtype").onchange = $("device").onchange = load;
$("stop").onclick = () => {
  stopped = true;
  engine.stop();
};
$("reset").onclick = () => {
  forget();
  setBusy(false);
};
$("again").onclick = () => {
  const { question } = turns.pop();
  tries += 1;
  while (!$("turns").lastChild.classList.contains("user")) $("turns").lastChild.remove();
  answer(question);
};
$("system").onchange = forget;
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  add("user", text);
  answer(text);
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
load();
