// Runs an export in Node: reads {root, ...} as JSON from stdin, prints the result as JSON on the last line of stdout.
import { readFileSync } from "node:fs";
import * as tf from "@huggingface/transformers";
import { ask } from "./ask.mjs";

const request = JSON.parse(readFileSync(0, "utf8"));
tf.env.allowRemoteModels = false;
tf.env.localModelPath = request.root;
tf.env.useFSCache = false;
let result;
try {
  result = await ask(tf, { ...request, device: "cpu" });
} catch (error) {
  result = { error: String(error?.message ?? error) };
}
process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0)); // a pipe takes 64 KB per write
