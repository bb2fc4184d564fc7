// Talking to the hive: the token, JSON calls with their one error shape, and the live stream.

const STORED = "hyperhive-token";
let token = "";
let refuse = () => {};

class Refusal extends Error {
  constructor(message, { code = "", hint = "", status = 0 } = {}) {
    super(message);
    Object.assign(this, { code, hint, status });
  }
}

// ── The token ────────────────────────────────────────────────────────────────────────────────────
// It comes once, behind the # of the link (which no server sees), and leaves the address bar at once.

/** Takes the token from the address or from the last visit. `on_refused` is told when it no longer opens anything. */
export function begin({ on_refused }) {
  refuse = on_refused;
  if (!take_token_from_address()) token = localStorage.getItem(STORED) ?? "";
  return token !== "";
}

export function take_token_from_address() {
  const match = /^#token=(.+)$/.exec(location.hash);
  if (!match) return false;
  keep_token(decodeURIComponent(match[1]));
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}

export function keep_token(text) {
  token = text.trim();
  localStorage.setItem(STORED, token);
}

// ── Calls ────────────────────────────────────────────────────────────────────────────────────────

export const get = (path) => call("GET", path);
export const post = (path, body = {}) => call("POST", path, body);

/** `ask`, never twice at once: called meanwhile, it asks once more, for the answer on its way may be too old by now. */
export function in_turn(ask) {
  let under_way = null;
  let again = false;
  async function run() {
    try {
      while (again) {
        again = false;
        await ask();
      }
    } finally {
      under_way = null;
    }
  }
  const call_it = () => {
    again = true;
    under_way ??= run();
    return under_way;
  };
  return Object.assign(call_it, { is_under_way: () => under_way !== null });
}

/** What was begun under a key, and when: [to, body] → the message with its id. */
const unsent = new Map();
const SAME_MS = 600000; // later, the same words are another message

/** Each keeps its id until all were taken: pressing Send again after a lost answer or a refusal is harmless. */
export async function send_messages(key, ...messages) {
  if (!(unsent.get(key)?.at > Date.now() - SAME_MS)) unsent.set(key, { at: Date.now(), begun: new Map() });
  const { begun } = unsent.get(key);
  for (const message of messages) {
    const text = JSON.stringify([message.to, message.body]);
    if (!begun.has(text)) begun.set(text, { ...message, client_id: random_id() });
    await post("/api/messages", begun.get(text));
  }
  unsent.delete(key);
}

// Not crypto.randomUUID: browsers have it on https and localhost only.
const random_id = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Hands a file to the hive; `begun` is given a function that breaks it off. fetch could not tell how far it is. */
export function upload(file, on_progress, begun) {
  const request = new XMLHttpRequest();
  const used = token;
  const gone = new Refusal("The file could not be handed over.", { hint: "Try again when the hive is back." });
  begun(() => request.abort());
  return new Promise((resolve, reject) => {
    request.upload.onprogress = ({ loaded }) => on_progress(loaded);
    request.onerror = () => reject(gone);
    request.onload = () => {
      const { status, response } = request;
      if (status === 200) return resolve(response);
      reject(refusal({ status, headers: new Headers() }, response ?? {}, used));
    };
    request.open("POST", `/api/files?name=${encodeURIComponent(file.name)}`);
    request.responseType = "json";
    request.setRequestHeader("Authorization", `Bearer ${token}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.send(file);
  });
}

async function call(method, path, body) {
  const used = token;
  const headers = { Authorization: `Bearer ${used}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new Refusal("The hive can't be reached.", {
      code: "unreachable",
      hint: "Nothing was changed that this page knows of. Try again when it is back.",
    });
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  throw refusal(response, answer, used);
}

/** The token is that of the request: there may be another by now. */
function refusal(response, answer, used) {
  if (response.status === 401 && used === token) refuse("This token is not valid (any more).");
  const text = answer.error ?? `The hive answered ${response.status}.`;
  return new Refusal(text, { code: answer.code, hint: answer.hint ?? wait_hint(response), status: response.status });
}

function wait_hint(response) {
  const seconds = response.headers.get("Retry-After");
  return seconds ? `Try again in ${seconds} s.` : "";
}

// ── The live stream ──────────────────────────────────────────────────────────────────────────────
// Server-sent events over fetch, so that the token goes along as a header. The server says something at
// least every 15 s; silence of 40 s is a dead connection.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10000;
const SILENCE_MS = 40000;

/** Asks for a stream; `cut` ends it. */
function ask_for_stream(path, last_id = "") {
  const headers = { Authorization: `Bearer ${token}` };
  if (last_id) headers["Last-Event-ID"] = last_id;
  const cut = new AbortController();
  return { path, token, cut, answer: fetch(path, { headers, signal: cut.signal, cache: "no-store" }) };
}

// This file is run before the rest of the page has come: by the time all is there to draw it, so is the snapshot.
let early = null;
token = localStorage.getItem(STORED) ?? "";
if (token && !/^#token=|^#.agents./.test(location.hash)) {
  early = ask_for_stream("/api/stream");
  early.answer.catch(() => {}); // whoever takes it is told
}

function take_early(path) {
  const asked = early;
  early = null;
  if (asked?.path === path && asked.token === token) return asked;
  asked?.cut.abort();
  return null;
}

export class Stream {
  constructor({ path, on_event, on_state }) {
    Object.assign(this, { path, on_event, on_state, last_id: "", wait_ms: FIRST_WAIT_MS, stopped: false });
    this.over = new AbortController();
    const { signal } = this.over;
    addEventListener("online", () => this.hurry(), { signal });
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry(), { signal });
    this.run();
  }

  /** Connect again, to another path: what was missed meanwhile comes along. */
  move(path) {
    if (path === this.path) return;
    this.path = path;
    this.moving = !this.wake; // while it waits to connect again, there is nothing to move
    this.cut?.abort();
    this.hurry();
  }

  hurry() {
    this.wake?.();
  }

  async run() {
    while (!this.stopped) {
      try {
        await this.listen();
      } catch (error) {
        if (error.status === 401) return;
      }
      if (this.moving) {
        this.moving = false;
        continue;
      }
      this.on_state(false);
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, this.wait_ms * (0.75 + Math.random() / 2));
      });
      this.wake = null;
      this.wait_ms = Math.min(this.wait_ms * 2, LONGEST_WAIT_MS);
    }
  }

  async listen() {
    const { cut, answer, token: used } = take_early(this.path) ?? ask_for_stream(this.path, this.last_id);
    this.cut = cut;
    this.expect();
    try {
      const response = await answer;
      if (!response.ok) throw refusal(response, await response.json().catch(() => ({})), used);
      this.wait_ms = FIRST_WAIT_MS;
      this.on_state(true);
      await this.read(response.body.pipeThrough(new TextDecoderStream()).getReader());
    } finally {
      clearTimeout(this.timer);
    }
  }

  expect() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.cut.abort(), SILENCE_MS);
  }

  async read(reader) {
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      this.expect();
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      blocks.forEach((block) => this.take(block));
    }
  }

  take(block) {
    let kind = "message";
    const data = [];
    for (const line of block.split("\n")) {
      if (line.startsWith("id:")) this.last_id = line.slice(3).trim();
      else if (line.startsWith("event:")) kind = line.slice(6).trim();
      else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    }
    if (data.length) this.on_event(kind, JSON.parse(data.join("\n")));
  }

  stop() {
    this.stopped = true;
    this.over.abort();
    this.cut?.abort();
    this.hurry();
  }
}
