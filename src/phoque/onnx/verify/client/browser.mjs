// One question to an export in Chromium: {chromium, client, modules, root, ...} on stdin, the answer on the last line.
import { readFileSync } from "node:fs";
import puppeteer from "puppeteer-core";
import { serve } from "./server.mjs";

const asked = JSON.parse(readFileSync(0, "utf8"));
const { server, port } = await serve({ ...asked, port: 0 });
const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
  "--disable-sync", "--no-first-run"];
if (asked.device === "webgpu")
  args.push("--enable-unsafe-webgpu", "--enable-features=Vulkan,WebGPU", "--use-webgpu-adapter=swiftshader",
    "--ignore-gpu-blocklist");
let found;
const browser = await puppeteer.launch({ executablePath: asked.chromium, args, headless: true,
  protocolTimeout: asked.seconds * 1e3 });
try {
  const page = await browser.newPage();
  const said = [];
  page.on("console", (message) => message.type() === "error" && said.push(message.text()));
  page.on("pageerror", (error) => said.push(String(error)));
  await page.goto(`http://127.0.0.1:${port}/blank.html`);
  found = await page.evaluate(async (asked) => {
    const tf = await import("/modules/@huggingface/transformers/dist/transformers.js");
    const { ask } = await import("/ask.mjs");
    tf.env.allowRemoteModels = false;
    tf.env.allowLocalModels = true; // which a browser does not by default
    tf.env.localModelPath = "/models/";
    tf.env.useBrowserCache = false;
    tf.env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
    try {
      return await ask(tf, asked);
    } catch (error) {
      return { error: String(error?.message ?? error) };
    }
  }, asked);
  if (found.error && said.length) found.error += ` (${said.at(-1)})`;
} catch (error) {
  found = { error: String(error?.message ?? error) };
} finally {
  await browser.close();
  server.close();
}
process.stdout.write(`${JSON.stringify(found)}\n`, () => process.exit(0)); // a pipe takes 64 KB at a time
