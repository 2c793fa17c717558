// Serves the page, Transformers.js and the export on 127.0.0.1 only, with the headers that wasm threads need.
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
  ".json": "application/json", ".wasm": "application/wasm", ".svg": "image/svg+xml" };

const LOCAL_HOST = /^(127\.0\.0\.1|localhost)(:\d+)?$/; // against DNS rebinding from another site

export function serve({ client, modules, root, name, port }) {
  const folders = { "/modules/": modules, [`/models/${name}/`]: join(root, name), "/": client };
  const server = createServer((request, response) => {
    const headers = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
    if (!LOCAL_HOST.test(request.headers.host ?? "")) {
      response.writeHead(403, headers).end();
      return;
    }
    const path = normalize(decodeURIComponent(new URL(request.url, "http://here").pathname));
    const [prefix, folder] = Object.entries(folders).find(([start]) => path.startsWith(start));
    const file = join(folder, path.slice(prefix.length) || "chat.html");
    let size;
    try {
      const stats = statSync(file);
      if (!stats.isFile()) throw new Error("not a file");
      size = stats.size;
    } catch {
      response.writeHead(404, headers).end();
      return;
    }
    const type = TYPES[extname(file)] ?? "application/octet-stream";
    response.writeHead(200, { ...headers, "Content-Type": type, "Content-Length": size, "Cache-Control": "no-store" });
    if (request.method === "HEAD") response.end();
    else createReadStream(file).pipe(response);
  });
  return new Promise((resolve, reject) => {
    server.on("error", reject);
    server.listen(port, "127.0.0.1", () => resolve({ server, port: server.address().port }));
  });
}
