// The first minutes of a hive, in three steps: start the manager, sign it in, ask it for something.

import { h } from "./dom.js";
import { button, refusal, state_words } from "./parts.js";
import { agent_named, is_running_phase, state } from "./store.js";
import { post, send_messages } from "./api.js";
import { composer } from "./composer.js";
import { deploy_card } from "./deploys.js";
import { signin } from "./signin.js";
import { why_words } from "./agents.js";

const manager = () => agent_named("manager");
const deploying = () => state.deploys.find((row) => row.agent === "manager" && is_running_phase(row.phase));
const SIGNED_OUT = ["needs_login", "signing_in"];
const SIGNED_IN = ["idle", "working"];

const A_LOT = 50; // of messages: then this hive is no new one, whoever wrote them

/** Nobody but the manager is there, and it was not asked for anything yet. */
export const is_first_run = () =>
  state.agents.every((agent) => agent.manager) &&
  state.messages.length < A_LOT &&
  state.messages.every((message) => message.from !== "operator");

/** These wait for the operator as one of the three steps. */
export const is_first_step = (row) =>
  row.kind === "start_manager" || (is_first_run() && row.kind === "needs_login" && row.agent === "manager");

// ── The steps ────────────────────────────────────────────────────────────────────────────────────

function start_step() {
  if (deploying()) return deploy_card(deploying(), { bare: true });
  const start = () => (manager() ? post("/api/agents/manager/start") : post("/api/agents", { name: "manager" }));
  return [
    h("div", { class: "buttons" }, button("start_manager", "Start the manager", start, { kind: "main" })),
    refusal("start_manager"),
  ];
}

/** It may be kept from work by something else than a sign-in. */
function sign_in_step() {
  const agent = manager();
  if (SIGNED_OUT.includes(agent.state)) return signin(agent, "/api/agents/manager");
  const words = why_words(agent) || "It has yet to say how it is.";
  return h("p", { class: "warn" }, words, " ", h("a", { href: "#/agents/manager" }, "Open manager"));
}

const ask_step = () =>
  composer({
    key: "to:manager",
    label: "Write to manager",
    placeholder: "What do you need? For example: an agent that keeps an eye on our backups.",
    name: "Send to manager",
    send: (body) => send_messages("to:manager", { to: "manager", body }),
    files: true,
  });

const STEPS = [
  {
    title: "Start the manager",
    state: () => {
      if (deploying()) return "the manager is being deployed";
      return manager() ? "the manager is stopped" : "there is no manager yet";
    },
    words: "The manager is the agent that you talk to. It asks for further agents, and for changes to them.",
    is_done: () => Boolean(manager()?.running),
    act: start_step,
  },
  {
    title: "Sign it in",
    state: () => `the manager is ${SIGNED_OUT.includes(manager().state) ? "signed out" : state_words(manager())}`,
    words: "Each agent has a Claude account's sign-in of its own. It lies on this machine and is kept when it is rebuilt.",
    is_done: () => Boolean(manager()?.running) && SIGNED_IN.includes(manager().state),
    act: sign_in_step,
  },
  {
    title: "Ask it for something",
    state: () => "the manager is ready",
    words: "What it wants to change appears here with all that it would do. Nothing happens until you approve it.",
    is_done: () => false,
    act: ask_step,
  },
];

export function welcome_card(props) {
  const now = STEPS.findIndex(({ is_done }) => !is_done());
  return h(
    "article",
    { ...props, key: "welcome", class: `card ${props.class ?? ""}`, "aria-label": "Welcome" },
    h(
      "header",
      { class: "card-head" },
      h("div", { class: "card-title" }, h("span", { class: "label" }, "Welcome"), h("h3", null, STEPS[now].state())),
    ),
    h(
      "ol",
      { class: "welcome" },
      STEPS.map(({ title, words, act }, index) =>
        h(
          "li",
          { class: index < now ? "done" : index === now ? "now" : "", "aria-current": index === now ? "step" : null },
          h("p", null, h("strong", null, title), index < now && h("span", { class: "ok" }, " ✓ done")),
          h("p", { class: "dim" }, words),
          index === now && act(),
        ),
      ),
    ),
  );
}
