// The dashboard: which view is shown, what stands around it, and the one stream that feeds it.

import { h, render } from "./dom.js";
import { dollars, plural } from "./text.js";
import { button, empty, heading, logo, panel, plain, refusal, REHEARSAL, toggled } from "./parts.js";
import { begin, post, Stream, take_token_from_address } from "./api.js";
import { changed, connected, draw_with, is_running_phase, on, state, take } from "./store.js";
import { banner, connecting, draw_following, follow_from_now, live_dot, token_view } from "./shell.js";
import { approval_card, press } from "./approval.js";
import { detail } from "./detail.js";
import { call_keys, call_view, load_past, past_view, rest_keys, show_card, waiting } from "./call.js";
import { agents_brief, agents_view, load_kept } from "./agents.js";
import { help_dialog, help_keys } from "./help.js";
import { tell_news } from "./notify.js";
import { flow_brief, unread_count } from "./mail.js";
import { deploys_view } from "./deploys.js";

// ── Routes ───────────────────────────────────────────────────────────────────────────────────────
// view(...): the main column · side(...): the other · tab: which one is lit · follows: the view grows at its end
// enter(...): once, when one comes · load(...): then, with each snapshot, and when the connection is back
// drawn(...): after each drawing · stream(...): the address of the stream that it needs

const usual_side = () => [agents_brief(), flow_brief()];

const ROUTES = [
  { path: /^\/call(?:\/([\w-]+))?$/, tab: "call", view: call_view, keys: call_keys, enter: show_card },
  { path: /^\/approvals$/, tab: "call", view: past_view, load: load_past },
  {
    path: /^\/approvals\/(\d+)$/,
    tab: "call",
    view: one_approval,
    keys: (event, id) => !event.repeat && approval_known(id) && press(approval_known(id), event.key),
  },
  { path: /^\/agents$/, tab: "agents", view: agents_view, side: flow_brief, load: load_kept },
  {
    path: /^\/agents\/([a-z][a-z0-9-]*)$/,
    tab: "agents",
    view: later("agent_view", coming),
    side: later("agent_view_side"),
    load: later("show_agent"),
    stream: (name) => `/api/stream?agent=${name}`,
    follows: true,
    wide: true,
  },
  {
    path: /^\/flow$/,
    tab: "flow",
    view: later("flow_view", coming),
    side: agents_brief,
    drawn: later("mark_read"),
    follows: true,
  },
  {
    path: /^\/flow\/thread\/(\d+)$/,
    tab: "flow",
    view: later("flow_view", coming),
    side: agents_brief,
    load: later("load_thread"),
    drawn: later("mark_read"),
    follows: true,
  },
  { path: /^\/deploys$/, tab: "deploys", view: deploys_view },
  { path: /^\/usage$/, tab: "usage", view: later("usage_view", coming), load: later("load_usage") },
  { path: /^\/system$/, tab: "system", view: later("system_view", coming), load: later("load_system") },
  { path: /^\/search$/, tab: "search", view: later("search_view", coming), load: later("load_search") },
  { path: /^\/more$/, tab: "more", view: more_view },
];

function where() {
  const path = location.hash.replace(/^#/, "") || "/call";
  for (const route of ROUTES) {
    const match = route.path.exec(path);
    if (match) return { route, parts: match.slice(1), path };
  }
  return { route: ROUTES[0], parts: [], path: "/call" };
}

// ── Views that come later ────────────────────────────────────────────────────────────────────────
// What waits for a person is on the screen before the rest of the page has come. They come all together then: no
// view has to wait when somebody goes there, and all of the page is of one version.

let views = null;
let asked = false;
let missing = false;

function later(name, meanwhile) {
  return (...parts) => (views ? views[name] : meanwhile)?.(...parts);
}

async function load_views() {
  if (asked) return;
  asked = true;
  views = await import("./views.js").catch(() => null);
  missing = !views;
  if (state.ready) load(place);
  changed();
}

/** The next drawing asks for them again. */
on("returned", () => {
  if (missing) asked = missing = false;
});

function coming() {
  if (!missing) return panel(null, empty("Loading…"));
  return panel(
    { class: "pad" },
    h("p", { class: "refusal", role: "alert" }, "This part of the page could not be loaded."),
    h("div", { class: "buttons" }, plain("Load the page again", () => location.reload())),
  );
}

// The address may be another already, and its view not entered yet.
let place = where();

const open_approval = (id) => state.approvals.find((row) => row.id === Number(id));
const approval_known = (id) => open_approval(id) ?? detail(Number(id)).row;

function one_approval(id) {
  const { error } = detail(Number(id), open_approval(id)?.digest);
  const row = approval_known(id);
  return [
    heading(`Request #${id}`, h("a", { href: "#/approvals" }, "All requests")),
    row
      ? approval_card(row, { keys: true })
      : panel({ class: "pad" }, error ? h("p", { class: "refusal", role: "alert" }, error.message) : "Loading…"),
  ];
}

// ── Around the view ──────────────────────────────────────────────────────────────────────────────

const TABS = [
  ["call", "Your call", () => waiting().length],
  ["agents", "Agents", () => 0],
  ["flow", "Flow", unread_count],
  ["deploys", "Deploys", () => state.deploys.filter((deploy) => is_running_phase(deploy.phase)).length],
  ["usage", "Usage", () => 0, "roomy"],
  ["system", "System", () => 0, "roomy"],
  ["search", "Search", () => 0, "roomy"],
  ["more", "More", () => 0, "narrow"],
];

const COUNTED = { call: "waiting for you", flow: "unread", deploys: "running" };

function tab([name, label, number_of, room], lit) {
  const number = number_of();
  return h(
    "a",
    { key: name, href: `#/${name}`, class: room ?? "", "aria-current": name === lit ? "page" : null },
    label,
    number > 0 &&
      h(
        "span",
        { class: `count ${name === "call" ? "" : "quiet-count"}`, "aria-label": `${number} ${COUNTED[name]}` },
        number,
      ),
  );
}

function pause_all() {
  const { agents } = state;
  const paused = agents.length > 0 && agents.every((agent) => agent.paused);
  return (
    agents.length > 0 &&
    button("pause_all", paused ? "Resume all" : "Pause all", () => post("/api/pause_all", { paused: !paused }))
  );
}

function top(lit) {
  return h(
    "header",
    { class: "top", key: "top" },
    h(
      "div",
      { class: "top-inner" },
      h("a", { class: "brand", href: "#/call" }, logo(), h("h1", null, "hyperhive")),
      h(
        "nav",
        { "aria-label": "Views" },
        TABS.map((one) => tab(one, lit)),
      ),
      h(
        "p",
        { class: "live dim" },
        live_dot(),
        state.live ? "live" : "disconnected",
        h(
          "span",
          { class: "more" },
          ` · ${plural(state.agents.length, "agent")} · ${dollars(state.usage.today_usd)} today`,
        ),
        state.hive.rehearsal && h("span", { class: "badge", title: REHEARSAL }, "rehearsal"),
      ),
      h("div", { class: "roomy" }, pause_all()),
    ),
  );
}

function more_view() {
  return [
    heading("More"),
    panel(
      null,
      [
        ["usage", "Usage", "what it cost, by agent and day"],
        ["system", "System", "what runs here, schedules, audit"],
        ["approvals", "All requests", "and how they ended"],
        ["search", "Search", "messages, requests and the audit"],
      ].map(([name, label, about]) =>
        h("a", { class: "row line", href: `#/${name}` }, h("strong", null, label), h("span", { class: "dim" }, about)),
      ),
    ),
    h("div", { class: "buttons after" }, pause_all()),
  ];
}

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

const TYPING = "input, textarea, select, [contenteditable]";
const PATIENCE_MS = 300; // a page that comes as fast as usual does not say first that it connects
let refused = null;

function draw() {
  if (refused !== null) {
    document.title = "hyperhive";
    return render(
      document.body,
      token_view(refused, "The command `url` of hyperhive, on the machine of the hive, prints the link with it.", start),
    );
  }
  if (!state.ready && performance.now() < PATIENCE_MS) return;
  const { route, parts } = place;
  const rows = waiting();
  const count = rows.length;
  document.title = `${count ? `(${count}) ` : ""}hyperhive`;
  const typed_in = document.activeElement?.closest(TYPING);
  draw_following(() => render(document.body, top(route.tab), banner(), page(place), help_dialog()), route.follows);
  if (typed_in && !typed_in.isConnected) rest_keys(); // what they type on is meant for nobody else
  restore_place();
  tell_news(rows);
  route.drawn?.(...parts);
  if (state.ready) load_views();
}

function page({ route, parts, path }) {
  if (!state.ready) return connecting();
  return h(
    "div",
    { key: "page", class: `page ${route.wide ? "wide" : ""}` },
    h(
      "main",
      { id: "main", tabindex: "-1", class: "column-main" },
      state.hive.rehearsal && route.view === call_view && h("p", { key: "rehearsal", class: "rehearsal" }, REHEARSAL),
      refusal("pause_all"),
      h("div", { key: path }, route.view(...parts)),
    ),
    h(
      "aside",
      { class: `column-side ${toggled("side") ? "shown" : ""}`, "aria-label": "Beside" },
      h("div", { key: route.side ? path : "usual" }, (route.side ?? usual_side)(...parts)),
    ),
  );
}

// ── Places ───────────────────────────────────────────────────────────────────────────────────────
// Back leads to where the person was. The browser can't: when it tries, what was there is not drawn yet.

history.scrollRestoration = "manual";
const places = new Map(); // entry of the history → how far down it was left
let entry = 0;
let wanted = null;

function change_place(follows) {
  places.set(entry, scrollY);
  entry = history.state?.entry ?? Date.now();
  history.replaceState({ entry }, "");
  wanted = follows ? null : (places.get(entry) ?? 0);
}

function restore_place() {
  if (wanted !== null) scrollTo({ top: wanted, behavior: "instant" });
  wanted = null;
}

// ── Events ───────────────────────────────────────────────────────────────────────────────────────

let stream = null;

const stream_path = ({ route, parts }) => route.stream?.(...parts) ?? "/api/stream";

function go() {
  if (take_token_from_address()) return start();
  place = where();
  follow_from_now(Boolean(place.route.follows));
  change_place(place.route.follows);
  if (refused !== null) return;
  stream?.move(stream_path(place));
  place.route.enter?.(...place.parts);
  if (place.route.tab !== "call") load_views();
  if (state.ready) load(place);
  changed();
}

const load = ({ route, parts }) => route.load?.(...parts);
for (const kind of ["snapshot", "returned"]) on(kind, () => load(place));

function on_key(event) {
  if (event.key === "Escape" && event.target.matches?.(TYPING)) return event.target.blur();
  if (refused !== null || event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.(TYPING)) return;
  if (toggled("help")) return;
  const { route, parts } = place;
  if (help_keys(event)) event.preventDefault();
  else route.keys?.(event, ...parts);
}

function on_refused(message) {
  refused = message;
  stream?.stop();
  stream = null;
  changed();
}

function start() {
  refused = begin({ on_refused }) ? null : "";
  stream?.stop();
  stream = null;
  if (refused === null) stream = new Stream({ path: stream_path(where()), on_event: take, on_state: connected });
  go();
  changed();
}

draw_with(draw);
addEventListener("hashchange", () => {
  go();
  requestAnimationFrame(() => document.getElementById("main")?.focus({ preventScroll: true }));
});
addEventListener("keydown", on_key);
document.addEventListener("visibilitychange", changed);
setTimeout(() => state.ready || changed(), PATIENCE_MS);
start();
