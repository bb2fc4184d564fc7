// The keys, listed on `?`.

import { h } from "./dom.js";
import { plain, toggle, toggled } from "./parts.js";

const KEYS = [
  ["a / d", "approve or deny the marked request"],
  ["1 – 9", "choose an answer of the marked question"],
  ["j / k", "mark the next or the one before"],
  ["Enter", "send what is typed (in a large field with Ctrl or ⌘)"],
  ["Esc", "leave a field: then keys act again"],
  ["g then c, a, f, d, u, s", "go to Your call, Agents, Flow, Deploys, Usage, System"],
  ["/", "search"],
  ["Ctrl or ⌘ with f", "find in an agent's transcript; again for the browser's own find"],
  ["?", "this list"],
];
const PLACES = { c: "call", a: "agents", f: "flow", d: "deploys", u: "usage", s: "system" };
let going = false;

/** True when the key was one of these, which hold in every view. */
export function help_keys({ key }) {
  const place = going && PLACES[key];
  going = key === "g";
  if (place) {
    location.hash = `#/${place}`;
    return true;
  }
  if (key === "?") toggle("help", true);
  if (key === "/") location.hash = "#/search";
  return going || key === "?" || key === "/";
}

export function help_dialog() {
  if (!toggled("help")) return null;
  return h(
    "dialog",
    {
      key: "help",
      class: "help",
      "aria-label": "Keys",
      made: (dom) => setTimeout(() => dom.isConnected && dom.showModal()),
      oncancel: () => toggle("help", false), // at once: `close` comes later, perhaps after the next key
      onclose: () => toggle("help", false),
    },
    h("h2", null, "Keys"),
    h(
      "dl",
      { class: "facts wide" },
      KEYS.map(([key, what]) => h("div", { class: "fact" }, h("dt", null, h("kbd", null, key)), h("dd", null, what))),
    ),
    plain("Close", () => toggle("help", false), { kind: "main" }),
  );
}
