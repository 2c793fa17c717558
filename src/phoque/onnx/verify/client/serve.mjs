// `phoque verify-onnx --serve`: takes {client, modules, root, name, port} as JSON; runs until it is stopped.
import { serve } from "./server.mjs";

try {
  const { port } = await serve(JSON.parse(process.argv[2]));
  console.log(JSON.stringify({ port }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error?.message ?? error) }));
  process.exit(1);
}
