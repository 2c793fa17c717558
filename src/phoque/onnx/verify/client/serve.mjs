// `phoque verify-onnx --serve`: takes {client, modules, root, name, port} as JSON; runs until it is stopped, or until
// phoque ends, which closes its standard input.
import { serve } from "./server.mjs";

process.stdin.on("end", () => process.exit(0)).resume();

try {
  const { port } = await serve(JSON.parse(process.argv[2]));
  console.log(JSON.stringify({ port }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error?.message ?? error) }));
  process.exit(1);
}
