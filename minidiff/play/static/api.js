// Questions to the server. Every failure is an Error whose message is one sentence for the page.

// a tab is a visitor of the queue
const bytes = crypto.getRandomValues(new Uint8Array(12));
export const visitor = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");

const GONE = "The server does not answer: is minidiff play still running?";

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(GONE);
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.message ?? `The server answered with status ${answer.status}.`);
  }
  return answer;
}

function posted(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

export async function get(path) {
  return (await ask(path)).json();
}

export async function post(path, body, signal) {
  return (await ask(path, posted(body, signal))).json();
}

// Calls hear(event) for each line of the answer. Ends when the job does; aborting the signal stops the job.
export async function stream(path, body, hear, signal) {
  const answer = await ask(path, posted({ visitor, ...body }, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(GONE);
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Error(event.message);
      hear(event);
    }
  }
}

// What a waiting job says of its place.
export function place(event) {
  if (event.event === "started") return "Starting.";
  if (event.place === 0) return "Next in the queue.";
  return `Waiting: ${event.place} ${event.place === 1 ? "job" : "jobs"} before this one.`;
}
