// Runs an export, in Node or in a browser: load it, return logits, generate an answer, and process an image.

const pixels = (side) => Uint8ClampedArray.from({ length: side * side * 3 }, (_, i) => (i * 37) % 256);

export async function ask(tf, { name, layout, dtype, device, messages, tokens, side, fp16 }) {
  const start = performance.now();
  const options = { dtype, device };
  const multimodal = layout === "multimodal";
  const tokenizer = await tf.AutoTokenizer.from_pretrained(name);
  const modelClass = multimodal ? tf.AutoModelForImageTextToText : tf.AutoModelForCausalLM;
  const model = await modelClass.from_pretrained(name, options);
  const loaded = performance.now();
  const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  const { logits } = await model(inputs);
  const [, length, vocabSize] = logits.dims;
  const last = Array.from(logits.to("float32").data.slice((length - 1) * vocabSize, length * vocabSize));
  const generating = performance.now();
  const out = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
  const done = performance.now();
  const generated = Array.from(out.slice(null, [inputs.input_ids.dims[1], null]).data, Number);
  const result = {
    prompt: Array.from(inputs.input_ids.data, Number), last, said: generated, text: tokenizer.decode(generated),
    load_s: (loaded - start) / 1e3, tokens_per_s: (1e3 * generated.length) / (done - generating),
  };
  if (multimodal && side) {
    const processor = await tf.AutoProcessor.from_pretrained(name);
    const image = new tf.RawImage(pixels(side), side, side, 3);
    const imageInputs = await processor(image, `${processor.config.image_token}`, { add_special_tokens: false });
    const answer = await model(imageInputs);
    const size = answer.logits.dims;
    result.image = {
      pixels: imageInputs.pixel_values.dims, prompt: Array.from(imageInputs.input_ids.data, Number),
      last: Array.from(answer.logits.to("float32").data.slice((size[1] - 1) * vocabSize, size[1] * vocabSize)),
      pixel_values: Array.from(imageInputs.pixel_values.data),
    };
  }
  await model.dispose();
  return result;
}
