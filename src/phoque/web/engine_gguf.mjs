// A GGUF file in wllama: llama.cpp as WebAssembly, in workers of its own.

export async function openGguf({ files, dtype }, progress) {
  const { Wllama } = await import("/modules/@wllama/wllama/esm/index.js");
  const options = { suppressNativeLog: true };
  const wllama = new Wllama({ default: "/modules/@wllama/wllama/esm/wasm/wllama.wasm" }, options);
  await wllama.loadModel([await download(files[dtype], progress)], { n_ctx: 2048, n_gpu_layers: 0 });
  let running;

  async function answer({ messages, temperature, tokens, seed, number, top_p, penalty }, show) {
    running = new AbortController();
    let text = "";
    let count = 0;
    let reason = "stop";
    const stream = await wllama.createChatCompletion({ messages, max_tokens: tokens, temperature, top_p,
      repeat_penalty: penalty, seed: seed + number, stream: true, abortSignal: running.signal });
    for await (const chunk of stream) {
      const choice = chunk.choices?.[0];
      if (choice?.finish_reason) reason = choice.finish_reason;
      const piece = choice?.delta?.content;
      if (!piece) continue;
      text += piece;
      count += 1;
      show(piece);
    }
    return { text, tokens: count, finish_reason: reason };
  }
  return { answer, stop: () => running?.abort(), close: () => wllama.exit() };
}

async function download(url, progress) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be loaded: ${response.status}.`);
  const total = Number(response.headers.get("Content-Length"));
  const parts = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return new Blob(parts);
    parts.push(value);
    loaded += value.length;
    progress(loaded, total);
  }
}
