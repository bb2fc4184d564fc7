// The agent's own page: the same parts as the dashboard's view of an agent, fed by the harness itself.

import { h, render } from "./dom.js";
import { dollars, set_clock } from "./text.js";
import { logo, toggled } from "./parts.js";
import { begin, get, in_turn, Stream, take_token_from_address } from "./api.js";
import { changed, connected, draw_with, state } from "./store.js";
import { banner, connecting, draw_following, follow_from_now, live_dot, token_view } from "./shell.js";
import { agent_main, agent_side } from "./agent.js";
import { pause_levers } from "./agents.js";
import { Transcript } from "./transcript.js";

let agent = null;
let transcript = null;
let threads = { questions: [], reminders: [] };
let stream = null;
let refused = null;

// ── What comes in ────────────────────────────────────────────────────────────────────────────────

const older = (before, max, find) =>
  get(`/api/events?before=${before}&max=${max}${find && `&find=${encodeURIComponent(find)}`}`);

function take(kind, data) {
  if (kind === "snapshot") take_snapshot(data);
  else if (data.kind === "agent") agent = data.row;
  else if (data.kind === "events") take_events(data.events);
  changed();
}

function take_snapshot(snapshot) {
  if (snapshot.now) set_clock(snapshot.now);
  agent = snapshot.agent;
  transcript ??= new Transcript(agent.name, older);
  transcript.refresh(snapshot.events);
  state.ready = true;
  load_threads();
}

function take_events(events) {
  transcript.add(events);
  if (events.some((event) => event.kind === "tool_result" || event.kind === "turn_end")) load_threads();
}

/** At most one a second: tools may come fast. */
const load_threads = in_turn(async () => {
  await new Promise((resolve) => {
    setTimeout(resolve, 1000);
  });
  try {
    const { asked, to_answer, reminders } = await get("/api/threads");
    threads = { questions: [...asked, ...to_answer], reminders };
  } catch {
    return; // the banner tells of a lost connection; what was known stays
  }
  changed();
});

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

function draw() {
  if (refused !== null)
    return render(document.body, token_view(refused, "The dashboard's links to this page carry it.", start));
  document.title = agent ? `${agent.name} · hyperhive` : "hyperhive";
  draw_following(() => render(document.body, top(), banner(), page()), true);
}

function top() {
  return h(
    "header",
    { class: "top", key: "top" },
    h(
      "div",
      { class: "top-inner" },
      h("div", { class: "brand" }, logo(), h("h1", null, agent?.name ?? "hyperhive")),
      h(
        "p",
        { class: "live dim" },
        live_dot(),
        state.live ? "live" : "disconnected",
        agent && ` · ${dollars(agent.cost_today_usd)} today`,
      ),
    ),
  );
}

function page() {
  if (!agent) return connecting();
  return h(
    "div",
    { key: "page", class: "page wide" },
    h("main", { class: "column-main" }, agent_main(agent, transcript, { base: "/api" }, null)),
    h(
      "aside",
      { class: `column-side ${toggled("side") ? "shown" : ""}`, "aria-label": "State" },
      agent_side(agent, "/api", threads, transcript.notes, { first: pause_levers(agent, "/api") }),
    ),
  );
}

// ── Start ────────────────────────────────────────────────────────────────────────────────────────

function start() {
  refused = begin({ on_refused }) ? null : "";
  stream?.stop();
  stream = refused === null ? new Stream({ path: "/api/stream", on_event: take, on_state: connected }) : null;
  follow_from_now(true);
  changed();
}

function on_refused(message) {
  refused = message;
  stream?.stop();
  stream = null;
  changed();
}

draw_with(draw);
addEventListener("hashchange", () => take_token_from_address() && start());
start();
