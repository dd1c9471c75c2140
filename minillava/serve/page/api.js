// The server's public API, as any client sees it.
const KEY = "minillava.key";

export class Refused extends Error {
  constructor(message, status, seconds) {
    super(message);
    this.status = status;
    this.seconds = seconds;
  }
}

export function setKey(key) { sessionStorage.setItem(KEY, key); }

function headers() {
  const key = sessionStorage.getItem(KEY);
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
}

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, {headers: headers(), ...options});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?", 0);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const told = body.error?.message ?? `the server answered with status ${answer.status}`;
  throw new Refused(told, answer.status, Number(answer.headers.get("retry-after")) || 0);
}

export const get = async path => (await send(path, {})).json();

// The events of a streamed answer, one after the other.
export async function* chat(body, signal) {
  const answer = await send("/v1/chat/completions", {method: "POST", body: JSON.stringify(body), signal});
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  let text = "", ended = false;
  while (!ended) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The connection broke off while the answer came.", 0);
    }
    text += decoder.decode(part.value, {stream: !part.done});
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a ping
      const data = event.slice(6);
      if (data === "[DONE]") { ended = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message, 500);
      yield chunk;
    }
    if (part.done && !ended) throw new Refused("The server went away before the answer ended.", 0);
  }
}

// What a person types to ask the same.
export function curl(body) {
  const key = sessionStorage.getItem(KEY) ? " -H \"Authorization: Bearer $MINILLAVA_API_KEY\"" : "";
  return `curl -N ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} --data-binary @- <<'END'\n${JSON.stringify(body)}\nEND`;
}
