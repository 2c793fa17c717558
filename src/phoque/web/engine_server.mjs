// A model that runs in phoque: each answer is one request, and its pieces come as server-sent events.

export async function openServer() {
  let running;

  async function answer(request, show) {
    running = new AbortController();
    const response = await fetch("/api/chat", { method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request), signal: running.signal });
    if (response.status === 503) throw new Error("Another page is being answered: wait for it, or stop it.");
    if (!response.ok) throw new Error(`phoque answered ${response.status}.`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("phoque was stopped.");
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = JSON.parse(event.slice("data: ".length));
        if (data.error) throw new Error(data.error);
        if (data.done) return data.done;
        show(data.token);
      }
    }
  }
  return { answer, stop: () => running?.abort(), close: () => running?.abort() };
}
