// The chat page; its parameters are in the URL: ?name=...&layout=...&dtypes=q4,q8
const query = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
const messages = [];
let worker;
let answer;

$("name").textContent = document.title = query.get("name");
for (const dtype of query.get("dtypes").split(",")) $("dtype").add(new Option(dtype, dtype));
// the default device is wasm, where int8 is the fastest precision
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
  element.textContent = text; // the model's output is never inserted as HTML
  $("turns").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}
function fail(text) {
  $("progress").hidden = true;
  turn("error", text);
  say("failed");
}

const handlers = {
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
    say(`${tokens} tokens, ${(tokens / seconds).toFixed(1)} per second, the first after ${first.toFixed(2)} s`);
    ready(true);
  },
  error({ text }) { fail(text); },
};

function load() {
  worker?.terminate();
  ready(false);
  if (!fits($("dtype").value)) return fail("This precision needs shader-f16, which this GPU lacks: choose another.");
  say("starting");
  worker = new Worker("/worker.mjs", { type: "module" });
  worker.onmessage = ({ data }) => handlers[data.kind](data);
  worker.onerror = (event) => fail(event.message ?? "the worker failed");
  worker.postMessage({
    kind: "load", name: query.get("name"), layout: query.get("layout"), dtype: $("dtype").value, device: $("device").value,
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
  say("processing the prompt");
  worker.postMessage({ kind: "ask", messages });
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
load();
