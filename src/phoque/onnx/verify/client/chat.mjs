// The chat page: what it is about stands in the address, ?name=...&layout=...&dtypes=q4,q8
const asked = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
const messages = [];
let worker;
let answer;

$("name").textContent = document.title = asked.get("name");
for (const dtype of asked.get("dtypes").split(",")) $("dtype").add(new Option(dtype, dtype));
// the device that is chosen first is wasm, where 8 bits that are made whole are the fastest
if ([...$("dtype").options].some((option) => option.value === "int8")) $("dtype").value = "int8";
const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
if (adapter) $("device").add(new Option("WebGPU", "webgpu"));
const fits = (dtype) => $("device").value === "wasm" || !dtype.includes("f") || dtype === "fp32" || adapter.features.has("shader-f16");

function say(text) { $("state").textContent = text; }
function ready(on) {
  $("text").disabled = $("send").disabled = !on;
  if (on) $("text").focus({ preventScroll: true });
}
function turn(role, text) {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.textContent = text; // what a model says is never markup
  $("turns").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}
function fail(text) {
  $("progress").hidden = true;
  turn("error", text);
  say("it failed");
}

const heard = {
  loading({ loaded, total }) {
    $("progress").hidden = false;
    $("progress").value = total ? loaded / total : 0;
    say(`loading ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`);
  },
  loaded({ seconds }) {
    $("progress").hidden = true;
    say(`loaded in ${seconds.toFixed(1)} s`);
    ready(true);
  },
  token({ text }) {
    answer.textContent += text;
    answer.scrollIntoView({ block: "end" });
  },
  done({ text, tokens, seconds, first }) {
    messages.push({ role: "assistant", content: text });
    answer.textContent = text;
    say(`${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second, the first after ${first.toFixed(2)} s`);
    ready(true);
  },
  error({ text }) { fail(text); },
};

function load() {
  worker?.terminate();
  ready(false);
  if (!fits($("dtype").value)) return fail("This GPU has no shader-f16, which this precision needs. Take another, or wasm.");
  say("starting");
  worker = new Worker("/worker.mjs", { type: "module" });
  worker.onmessage = ({ data }) => heard[data.kind](data);
  worker.onerror = (event) => fail(event.message ?? "the worker stopped");
  worker.postMessage({
    kind: "load", name: asked.get("name"), layout: asked.get("layout"), dtype: $("dtype").value, device: $("device").value,
  });
}

$("dtype").onchange = $("device").onchange = load;
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  messages.push({ role: "user", content: text });
  turn("user", text);
  answer = turn("assistant", "");
  ready(false);
  say("reading");
  worker.postMessage({ kind: "ask", messages });
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
load();
