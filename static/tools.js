// One call of a tool, as a slim box: what was called, how it went, and on demand all of it.

import { h } from "./dom.js";
import { duration, plural } from "./text.js";
import { toggle, toggled } from "./parts.js";
import { counts, diff_lines, diff_view, edit_lines } from "./diff.js";

const SHOWN_LINES = 5;
const SHOWN_CHARACTERS = 700;
const OURS = "mcp__hive__";

// What of the input says most, for tools we know; for others the first text in it.
const TELLING = {
  Bash: (input) => input.command,
  Read: (input) => input.file_path,
  Edit: (input) => input.file_path,
  MultiEdit: (input) => input.file_path,
  Write: (input) => input.file_path,
  NotebookEdit: (input) => input.notebook_path,
  WebFetch: (input) => input.url,
  WebSearch: (input) => input.query,
  Grep: (input) => [input.pattern, input.path].filter(Boolean).join("  in "),
  Glob: (input) => input.pattern,
  Task: (input) => input.description,
  Agent: (input) => input.description,
  [`${OURS}send`]: (input) => `to ${input.to}: ${input.body}`,
  [`${OURS}ask`]: (input) => input.question,
};

function telling(name, input) {
  const text = TELLING[name]?.(input) ?? Object.values(input).find((value) => typeof value === "string") ?? "";
  return String(text);
}

const title = (name) => (name.startsWith(OURS) ? name.slice(OURS.length) : name);

/** `step` is {call, result?, children}; `key` names its folds; `draw_child` draws a step of a sub-agent. */
export function tool_box(key, step, draw_child) {
  const { name, input = {} } = step.call.data;
  const edits = edits_of(name, input);
  const open = toggled(key);
  return h(
    "div",
    { class: `tool ${step.result?.data.is_error ? "wrong" : ""}` },
    h(
      "button",
      { type: "button", class: "tool-head", "aria-expanded": String(open), onclick: () => toggle(key, !open) },
      h("b", null, title(name)),
      h("code", null, first_line(telling(name, input))),
      h("span", { class: "outcome" }, outcome(step, edits)),
    ),
    open && input_view(name, input, edits),
    step.children.length > 0 && nested(key, step.children, draw_child),
    step.result &&
      (open || worth_showing(step.result.data, edits)) &&
      [
        output_view(key, step.result.data, name === "Read" ? 0 : SHOWN_LINES, open),
        pictures_view(step.result.data, name, open),
      ],
  );
}

function first_line(text) {
  const line = text.split("\n", 1)[0];
  return line.length < text.length ? `${line} …` : line;
}

function edits_of(name, input) {
  let edits = null;
  if (name === "Write") edits = [["", input.content ?? ""]];
  if (name === "Edit") edits = [[input.old_string ?? "", input.new_string ?? ""]];
  if (name === "MultiEdit") edits = (input.edits ?? []).map((edit) => [edit.old_string ?? "", edit.new_string ?? ""]);
  return edits?.map(([before, after]) => edit_lines(String(before), String(after)));
}

function outcome({ call, result }, edits) {
  if (!result) return h("span", { class: "dim" }, "…");
  if (result.data.is_error) return h("span", { class: "bad" }, "✗ failed");
  if (edits) {
    const number_of = (kind) => edits.flat().filter(([other]) => other === kind).length;
    return counts({ added: number_of("added"), removed: number_of("removed") });
  }
  const took = Date.parse(result.at) - Date.parse(call.at);
  return ["✓ ", took >= 0 && duration(took)];
}

// What an edit answers, and our own tools' bare "ok", is only shown on demand.
const BARE = /^\{"(ok":true|id":\d+)\}$/;
const worth_showing = ({ output = "", is_error, images }, edits) =>
  is_error || images > 0 || (!edits && !BARE.test(output));

// ── Pictures ─────────────────────────────────────────────────────────────────────────────────────
// They come as base64 with the result, if they are small. Nothing else may become a `data:` address.

const PICTURE_TYPES = new Set(["image/png", "image/jpeg", "image/gif", "image/webp"]);
const PICTURE_DATA = /^[A-Za-z0-9+/]+={0,2}$/;
const PICTURE_CHARACTERS = 1 << 20;

const is_picture = ({ type, data }) =>
  PICTURE_TYPES.has(type) && typeof data === "string" && data.length <= PICTURE_CHARACTERS && PICTURE_DATA.test(data);

function pictures_view({ images = 0, pictures = [] }, name, open) {
  const shown = pictures.filter(is_picture);
  const left = Math.max(images, pictures.length) - shown.length;
  return [
    shown.length > 0 &&
      h(
        "div",
        { class: `pictures ${open ? "large" : ""}` },
        shown.map(({ type, data }, index) =>
          h("img", {
            src: `data:${type};base64,${data}`,
            alt: `Picture ${index + 1} of ${shown.length}, result of ${title(name)}`,
            decoding: "async",
          }),
        ),
      ),
    left > 0 &&
      h("p", { class: "dim pad" }, shown.length ? `${plural(left, "more picture")}, not kept` : `${plural(left, "picture")}, not kept`),
  ];
}

function input_view(name, input, edits) {
  if (edits) return edits.map((lines) => diff_lines(lines));
  const only = Object.keys(input).length === 1 && typeof Object.values(input)[0] === "string";
  const text = only || name === "Bash" ? telling(name, input) : JSON.stringify(input, null, 2);
  return h("pre", { class: "input", tabindex: "0" }, text);
}

function nested(key, children, draw_child) {
  const open = toggled(`${key}:steps`);
  return h(
    "div",
    { class: "nested" },
    h(
      "button",
      { type: "button", class: "quiet", "aria-expanded": String(open), onclick: () => toggle(`${key}:steps`, !open) },
      `sub-agent, ${plural(children.length, "step")}, ${open ? "fold" : "unfold"}`,
    ),
    open && children.map(draw_child),
  );
}

function output_view(key, { output = "", is_error }, shown, open) {
  const text = output.replace(/\s+$/, "");
  const lines = text === "" ? 0 : text.split("\n").length;
  const whole = open || (lines <= shown && text.length <= SHOWN_CHARACTERS);
  if (!lines) return null;
  if (whole && text.startsWith("diff --git "))
    return h("div", { class: "output-diff" }, diff_view(key, text));
  const part = whole ? text : text.split("\n").slice(0, shown).join("\n").slice(0, SHOWN_CHARACTERS);
  return [
    part && h("pre", { class: `output ${is_error ? "bad" : ""}`, tabindex: "0" }, part),
    !whole &&
      h(
        "button",
        { type: "button", class: "quiet more", onclick: () => toggle(key, true) },
        lines > 1 && lines > shown ? `all ${plural(lines, "line")}` : "show all of it",
      ),
  ];
}
