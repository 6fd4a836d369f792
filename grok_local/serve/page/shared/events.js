/** Server-sent events, read from a response as they come. */

/** Yields {event, data}; comments are left out. */
export async function* eventsOf(response) {
  let event = "message";
  let data = [];
  for await (const line of linesOf(response)) {
    if (line === "") {
      if (data.length) yield { event, data: data.join("\n") };
      event = "message";
      data = [];
    } else if (line.startsWith("data:")) data.push(valueOf(line));
    else if (line.startsWith("event:")) event = valueOf(line);
  }
}

const valueOf = (line) => line.slice(line.indexOf(":") + 1).replace(/^ /, "");

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    yield* lines;
  }
}
