// Who talks to whom, drawn: a line is as thick as the messages between two are many.

import { h } from "./dom.js";
import { by_name } from "./store.js";
import { plural, you_or } from "./text.js";

/** [{a, b, count}]: both directions together, the system and messages to everyone left out. */
function pairs(messages) {
  const found = new Map();
  for (const { from, to, broadcast } of messages) {
    if (from === "system" || to === "system" || from === to || broadcast) continue;
    const [a, b] = [from, to].sort();
    const pair = found.get(`${a} ${b}`) ?? { a, b, count: 0 };
    found.set(`${a} ${b}`, { ...pair, count: pair.count + 1 });
  }
  return [...found.values()].sort((one, other) => one.count - other.count);
}

/** They stand on an ellipse, with room for a name each. */
function places(names) {
  const across = Math.max(180, 15 * names.length);
  const down = Math.max(108, 11 * names.length);
  const [width, height] = [2 * across + 160, 2 * down + 84];
  const place = (angle) => ({ x: width / 2 + Math.cos(angle) * across, y: height / 2 + Math.sin(angle) * down });
  const at = new Map(names.map((name, index) => [name, place((2 * Math.PI * index) / names.length - Math.PI / 2)]));
  return { width, height, at };
}

const said = ({ a, b, count }) => `${you_or(a)} and ${you_or(b)}: ${plural(count, "message")}`;

export function talk_graph(messages) {
  const edges = pairs(messages);
  if (!edges.length) return h("p", { class: "empty" }, "No two have written to each other yet.");
  const names = [...new Set(edges.flatMap(({ a, b }) => [a, b]))].sort(by_name);
  const { width, height, at } = places(names);
  const most = edges.at(-1).count;
  const graph = h(
    "svg",
    {
      class: "graph",
      viewBox: `0 0 ${width} ${height}`,
      vars: { "--width": width },
      role: "img",
      "aria-label": edges.map(said).join("; "),
    },
    edges.map((edge) => {
      const [from, to] = [at.get(edge.a), at.get(edge.b)];
      const width = (1 + (7 * edge.count) / most).toFixed(1);
      const ends = { x1: from.x, y1: from.y, x2: to.x, y2: to.y };
      return h("line", { key: `${edge.a} ${edge.b}`, ...ends, "stroke-width": width }, h("title", null, said(edge)));
    }),
    names.map((name) => {
      const { x, y } = at.get(name);
      const word = you_or(name);
      const half = word.length * 4.2 + 10;
      return h(
        "g",
        { key: name },
        h("rect", { x: x - half, y: y - 14, width: 2 * half, height: 28, rx: 14 }),
        h("text", { x, y: y + 5, "text-anchor": "middle" }, word),
      );
    }),
  );
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Who talks to whom" }, graph);
}
