// Runs a GGUF file in Chromium with wllama: {chromium, url, path, messages, ...} as JSON on
// stdin, the answer as JSON on stdout. The page is given the file's own chat template, by llama.cpp's template engine.
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

const request = JSON.parse(readFileSync(0, "utf8"));
const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
  "--disable-sync", "--no-first-run"];
let result;
const browser = await puppeteer.launch({ executablePath: request.chromium, args, headless: true,
  protocolTimeout: request.seconds * 1e3 });
try {
  const page = await browser.newPage();
  const pageErrors = [];
  page.on("console", (message) => message.type() === "error" && pageErrors.push(message.text()));
  page.on("pageerror", (error) => pageErrors.push(String(error)));
  await page.goto(`${request.url}blank.html`);
  result = await page.evaluate(async (request) => {
    const { Wllama } = await import("/modules/@wllama/wllama/esm/index.js");
    const wllama = new Wllama({ default: "/modules/@wllama/wllama/esm/wasm/wllama.wasm" }, { suppressNativeLog: true });
    try {
      const start = performance.now();
      const file = await (await fetch(request.path)).blob();
      const fetched = performance.now();
      await wllama.loadModel([file], { n_ctx: request.length, n_gpu_layers: 0, n_threads: request.threads });
      const loaded = performance.now();
      let first;
      let text = "";
      let tokens = 0;
      const stream = await wllama.createChatCompletion({ messages: request.messages, max_tokens: request.tokens,
        temperature: 0, stream: true });
      for await (const chunk of stream) {
        const piece = chunk.choices?.[0]?.delta?.content;
        if (!piece) continue;
        first ??= performance.now();
        text += piece;
        tokens += 1;
      }
      const done = performance.now();
      return { text, tokens, fetch_s: (fetched - start) / 1e3, load_s: (loaded - fetched) / 1e3,
        first_s: ((first ?? done) - loaded) / 1e3, tokens_per_s: (1e3 * (tokens - 1)) / (done - (first ?? loaded)) || 0,
        memory_mb: (performance.memory?.usedJSHeapSize ?? 0) / 1e6 };
    } catch (error) {
      return { error: String(error?.message ?? error) };
    }
  }, request);
  if (result.error && pageErrors.length) result.error += ` (${pageErrors.at(-1)})`;
} catch (error) {
  result = { error: String(error?.message ?? error) };
} finally {
  await browser.close();
}
process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0));
