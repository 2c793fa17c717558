// Runs a GGUF file in Node: {file, text, tokens, length} as JSON on stdin, the answer as JSON on the last line of stdout.
import { readFileSync } from "node:fs";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const request = JSON.parse(readFileSync(0, "utf8"));
let result;
try {
  const options = { build: "never", gpu: false, logLevel: LlamaLogLevel.error, progressLogs: false, maxThreads: request.threads };
  const llama = await getLlama(options);
  const start = performance.now();
  const model = await llama.loadModel({ modelPath: request.file });
  const context = await model.createContext({ contextSize: request.length });
  const loaded = performance.now();
  const prompt = model.tokenize(request.text, true);
  const answer = [];
  for await (const token of context.getSequence().evaluate([...prompt], { temperature: 0 })) {
    if (model.isEogToken(token)) break;
    answer.push(token);
    if (answer.length >= request.tokens) break;
  }
  const seconds = (performance.now() - loaded) / 1e3;
  result = { prompt, answer, load_s: (loaded - start) / 1e3, tokens_per_s: answer.length / seconds };
} catch (error) {
  result = { error: String(error?.message ?? error) };
}
process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0));
