// One question to an export in Node: {root, ...} as JSON on stdin, the answer as JSON on the last line of stdout.
import { readFileSync } from "node:fs";
import * as tf from "@huggingface/transformers";
import { ask } from "./ask.mjs";

const asked = JSON.parse(readFileSync(0, "utf8"));
tf.env.allowRemoteModels = false;
tf.env.localModelPath = asked.root;
tf.env.useFSCache = false;
let found;
try {
  found = await ask(tf, { ...asked, device: "cpu" });
} catch (error) {
  found = { error: String(error?.message ?? error) };
}
process.stdout.write(`${JSON.stringify(found)}\n`, () => process.exit(0)); // a pipe takes 64 KB at a time
