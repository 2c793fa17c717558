// An ONNX export in Transformers.js, in a worker, so that the page stays responsive.

export function openOnnx({ path, layout, dtype, device }, progress) {
  const worker = new Worker("/worker.mjs", { type: "module" });
  let pending; // {resolve, reject, show}

  const engine = {
    answer: (request, show) => new Promise((resolve, reject) => {
      pending = { resolve, reject, show };
      worker.postMessage({ kind: "ask", ...request });
    }),
    stop: () => worker.postMessage({ kind: "stop" }),
    close: () => worker.terminate(),
  };
  return new Promise((resolve, reject) => {
    const handlers = {
      loading: ({ loaded, total }) => progress(loaded, total),
      loaded: () => resolve(engine),
      token: ({ text }) => pending.show(text),
      done: (data) => pending.resolve(data),
      error: ({ text }) => (pending?.reject ?? reject)(new Error(text)),
    };
    worker.onmessage = ({ data }) => handlers[data.kind](data);
    worker.onerror = (event) => (pending?.reject ?? reject)(new Error(event.message ?? "the worker failed"));
    worker.postMessage({ kind: "load", name: path, layout, dtype, device });
  });
}
