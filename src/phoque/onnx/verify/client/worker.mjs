// Loads and runs the model in a worker, so that the page stays responsive.
import * as tf from "/modules/@huggingface/transformers/dist/transformers.js";

tf.env.allowRemoteModels = false;
tf.env.allowLocalModels = true;
tf.env.localModelPath = "/models/";
tf.env.useBrowserCache = false;
tf.env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
let tokenizer;
let model;

async function load({ name, layout, dtype, device }) {
  const start = performance.now();
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
  postMessage({ kind: "loaded", seconds: (performance.now() - start) / 1e3 });
}

async function ask({ messages }) {
  const start = performance.now();
  let first = 0;
  let tokens = 0;
  const streamer = new tf.TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true,
    callback_function: (text) => postMessage({ kind: "token", text }),
    token_callback_function: () => {
      tokens += 1;
      first ||= (performance.now() - start) / 1e3;
    },
  });
  const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  const out = await model.generate({ ...inputs, max_new_tokens: 256, do_sample: false, streamer });
  const generated = out.slice(null, [inputs.input_ids.dims[1], null]);
  const [text] = tokenizer.batch_decode(generated, { skip_special_tokens: true });
  postMessage({ kind: "done", text, tokens, first, seconds: (performance.now() - start) / 1e3 });
}

onmessage = async ({ data }) => {
  try {
    await (data.kind === "load" ? load(data) : ask(data));
  } catch (error) {
    postMessage({ kind: "error", text: String(error?.message ?? error) });
  }
};
