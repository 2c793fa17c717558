// What a client does with an export, the same in Node and in a browser: load it, answer, look at an image.

const pixels = (side) => Uint8ClampedArray.from({ length: side * side * 3 }, (_, i) => (i * 37) % 256);

export async function ask(tf, { name, layout, dtype, device, messages, tokens, side, fp16 }) {
  const began = performance.now();
  const options = { dtype, device };
  const seeing = layout === "multimodal";
  const tokenizer = await tf.AutoTokenizer.from_pretrained(name);
  const kind = seeing ? tf.AutoModelForImageTextToText : tf.AutoModelForCausalLM;
  const model = await kind.from_pretrained(name, options);
  const loaded = performance.now();
  const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  const { logits } = await model(inputs);
  const [, length, rows] = logits.dims;
  const last = Array.from(logits.to("float32").data.slice((length - 1) * rows, length * rows));
  const generating = performance.now();
  const out = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
  const done = performance.now();
  const said = Array.from(out.slice(null, [inputs.input_ids.dims[1], null]).data, Number);
  const found = {
    prompt: Array.from(inputs.input_ids.data, Number), last, said, text: tokenizer.decode(said),
    load_s: (loaded - began) / 1e3, tokens_per_s: (1e3 * said.length) / (done - generating),
  };
  if (seeing && side) {
    const processor = await tf.AutoProcessor.from_pretrained(name);
    const image = new tf.RawImage(pixels(side), side, side, 3);
    const shown = await processor(image, `${processor.config.image_token}`, { add_special_tokens: false });
    const answer = await model(shown);
    const size = answer.logits.dims;
    found.image = {
      pixels: shown.pixel_values.dims, prompt: Array.from(shown.input_ids.data, Number),
      last: Array.from(answer.logits.to("float32").data.slice((size[1] - 1) * rows, size[1] * rows)),
      pixel_values: Array.from(shown.pixel_values.data),
    };
  }
  await model.dispose();
  return found;
}
