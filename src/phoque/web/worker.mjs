// Loads and runs an ONNX export in a worker.
import * as tf from "/modules/@huggingface/transformers/dist/transformers.js";

tf.env.allowRemoteModels = false;
tf.env.allowLocalModels = true;
tf.env.localModelPath = "/models/";
tf.env.useBrowserCache = false;
tf.env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
const stopping = new tf.InterruptableStoppingCriteria();
let tokenizer;
let model;

async function load({ name, layout, dtype, device }) {
  const files = {};
  const progress_callback = (event) => {
    if (event.status !== "progress") return;
    files[event.file] = [event.loaded, event.total];
    const sum = (index) => Object.values(files).reduce((total, file) => total + (file[index] ?? 0), 0);
    postMessage({ kind: "loading", loaded: sum(0), total: sum(1) });
  };
  tokenizer = await tf.AutoTokenizer.from_pretrained(name);
  const modelClass = layout === "multimodal" ? tf.AutoModelForImageTextToText : tf.AutoModelForCausalLM;
  model = await modelClass.from_pretrained(name, { dtype, device, progress_callback });
  postMessage({ kind: "loaded" });
}

async function ask({ messages, temperature, tokens, top_p, penalty }) {
  let count = 0;
  const streamer = new tf.TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true,
    callback_function: (text) => postMessage({ kind: "token", text }),
    token_callback_function: () => { count += 1; },
  });
  const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  const sampling = temperature > 0 ? { do_sample: true, temperature, top_p } : { do_sample: false };
  stopping.reset();
  const out = await model.generate({ ...inputs, ...sampling, repetition_penalty: penalty, max_new_tokens: tokens,
    streamer, stopping_criteria: stopping });
  const generated = out.slice(null, [inputs.input_ids.dims[1], null]);
  const [text] = tokenizer.batch_decode(generated, { skip_special_tokens: true });
  postMessage({ kind: "done", text, tokens: count, finish_reason: count >= tokens ? "length" : "stop" });
}

onmessage = async ({ data }) => {
  try {
    if (data.kind === "stop") stopping.interrupt();
    else await (data.kind === "load" ? load(data) : ask(data));
  } catch (error) {
    postMessage({ kind: "error", text: String(error?.message ?? error) });
  }
};
