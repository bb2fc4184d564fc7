// What changed between any two configs that an agent was given.

import { h } from "./dom.js";
import { clock, short_sha } from "./text.js";
import { button, choice, empty, heading, panel, refusal } from "./parts.js";
import { state } from "./store.js";
import { get } from "./api.js";
import { diff_view, split_switch } from "./diff.js";

const chosen = { agent: "", from: "", to: "" };
let shown = null; // {key, diff, cut_bytes}

const deployed = (agent) =>
  [...state.deploys]
    .sort((a, b) => b.id - a.id)
    .filter((row) => row.sha && row.phase === "deployed" && row.agent === agent);

/** Each config once, by its newest deploy, newest first. */
function configs(agent) {
  const seen = new Set();
  return deployed(agent).filter(({ sha }) => !seen.has(sha) && seen.add(sha));
}

async function compare(agent, from, to) {
  const query = new URLSearchParams({ from, to });
  const { diff, cut_bytes } = await get(`/api/agents/${agent}/diff?${query}`);
  shown = { key: `${agent}:${from}:${to}`, diff, cut_bytes };
}

const labelled = (label, ...more) =>
  h("label", { class: "choice" }, h("span", { class: "dim" }, `${label} `), choice(label, ...more));

export function compare_panel() {
  const agents = [...new Set(state.deploys.map(({ agent }) => agent))]
    .filter((agent) => configs(agent).length > 1)
    .sort();
  if (!agents.length) return null;
  const agent = agents.includes(chosen.agent) ? chosen.agent : agents[0];
  const rows = configs(agent);
  const known = (sha, otherwise) => (rows.some((row) => row.sha === sha) ? sha : otherwise);
  const from = known(chosen.from, rows[1].sha);
  const to = known(chosen.to, rows[0].sha);
  const options = rows.map((row) => [row.sha, `${short_sha(row.sha)}, ${clock(row.ended_at ?? row.started_at)}`]);
  return [
    heading("Compare two configs", split_switch()),
    panel(
      null,
      h(
        "div",
        { class: "pad buttons" },
        labelled(
          "of",
          agent,
          agents.map((name) => [name, name]),
          (name) => Object.assign(chosen, { agent: name }),
        ),
        labelled("from", from, options, (sha) => Object.assign(chosen, { from: sha })),
        labelled("to", to, options, (sha) => Object.assign(chosen, { to: sha })),
        button("compare", "Compare", () => compare(agent, from, to), { disabled: from === to }),
      ),
      refusal("compare"),
      shown?.key === `${agent}:${from}:${to}` &&
        (shown.diff ? diff_view(`compare:${shown.key}`, shown.diff, shown) : empty("They have the same files.")),
    ),
  ];
}
