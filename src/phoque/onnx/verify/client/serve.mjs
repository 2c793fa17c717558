// `phoque verify-onnx --serve`: {client, modules, root, port} as JSON in the first argument; runs until it is ended.
import { serve } from "./server.mjs";

try {
  const { port } = await serve(JSON.parse(process.argv[2]));
  console.log(JSON.stringify({ port }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error?.message ?? error) }));
  process.exit(1);
}
