// Runs an export in Chromium: {chromium, url, ...} as JSON on stdin, the result as JSON on stdout.
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";

const request = JSON.parse(readFileSync(0, "utf8"));
const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
  "--disable-sync", "--no-first-run"];
if (request.device === "webgpu")
  args.push("--enable-unsafe-webgpu", "--enable-features=Vulkan,WebGPU", "--use-webgpu-adapter=swiftshader",
    "--ignore-gpu-blocklist");
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
    const tf = await import("/modules/@huggingface/transformers/dist/transformers.js");
    const { ask } = await import("/scripts/ask.mjs");
    tf.env.allowRemoteModels = false;
    tf.env.allowLocalModels = true; // off by default in a browser
    tf.env.localModelPath = "/models/";
    tf.env.useBrowserCache = false;
    tf.env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
    try {
      return await ask(tf, request);
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
process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0)); // a pipe takes 64 KB per write
