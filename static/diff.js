// A unified diff as git writes it, told apart into files and drawn in colour, each file foldable.

import { exact, h } from "./dom.js";
import { fold } from "./parts.js";

const LINES_OPEN = 400; // a longer file starts folded

/** [{path, lines: [[kind, text]], added, removed, note}]; kind is "added", "removed", "same", "place". */
function parse_diff(text) {
  const files = [];
  let file = null;
  let in_hunk = false;
  for (const line of exact(text).split("\n")) {
    if (line.startsWith("diff --git ")) {
      file = { path: path_of_header(line), lines: [], added: 0, removed: 0, note: "" };
      files.push(file);
      in_hunk = false;
    } else if (file && line.startsWith("@@")) {
      in_hunk = true;
      if (!line.startsWith("@@ -0,0")) file.lines.push(["place", line]);
    } else if (file && in_hunk) take_line(file, line);
    else if (file) take_header(file, line);
  }
  return files;
}

function path_of_header(line) {
  const half = / b\/(.*)$/.exec(line);
  return half ? half[1] : line.slice(11);
}

function take_header(file, line) {
  if (line.startsWith("+++ b/")) file.path = line.slice(6);
  else if (line.startsWith("new file")) file.note = "new";
  else if (line.startsWith("deleted file")) file.note = "deleted";
  else if (line.startsWith("rename from ")) file.note = `was ${line.slice(12)}`;
  else if (line.startsWith("Binary files")) file.note = "binary, not shown";
}

function take_line(file, line) {
  if (line.startsWith("+")) {
    file.added += 1;
    file.lines.push(["added", line]);
  } else if (line.startsWith("-")) {
    file.removed += 1;
    file.lines.push(["removed", line]);
  } else if (line !== "") file.lines.push([line.startsWith("\\") ? "place" : "same", line]);
}

export function diff_lines(lines) {
  return h(
    "pre",
    { class: "diff", tabindex: "0" },
    lines.map(([kind, text]) =>
      h(
        "span",
        { class: kind },
        kind === "place" ? text : [h("i", { class: "sign" }, text.slice(0, 1)), text.slice(1)],
        "\n",
      ),
    ),
  );
}

export function diff_view(key, text) {
  const files = parse_diff(text);
  if (!files.length) return h("p", { class: "dim pad" }, text.trim() ? text : "No change to any file.");
  return files.map((file) =>
    fold(
      `${key}:${file.path}`,
      [
        h("span", { class: "path" }, file.path),
        h("span", { class: "figures" }, counts(file)),
        file.note && h("span", { class: "dim" }, file.note),
      ],
      () => file.lines.length > 0 && diff_lines(file.lines),
      { otherwise: file.lines.length <= LINES_OPEN, class: "file" },
    ),
  );
}

export const counts = ({ added, removed }) => [
  h("b", { class: "plus" }, `+${added}`),
  " ",
  h("b", { class: "minus" }, `−${removed}`),
];

/** What an edit tool did, as lines: the common start and end of both texts stay plain. */
export function edit_lines(before, after) {
  const old_lines = before === "" ? [] : exact(before).split("\n");
  const new_lines = after === "" ? [] : exact(after).split("\n");
  let start = 0;
  while (start < old_lines.length && start < new_lines.length && old_lines[start] === new_lines[start]) start += 1;
  let end = 0;
  while (
    end < old_lines.length - start &&
    end < new_lines.length - start &&
    old_lines.at(-1 - end) === new_lines.at(-1 - end)
  )
    end += 1;
  return [
    ...old_lines.slice(0, start).map((line) => ["same", ` ${line}`]),
    ...old_lines.slice(start, old_lines.length - end).map((line) => ["removed", `-${line}`]),
    ...new_lines.slice(start, new_lines.length - end).map((line) => ["added", `+${line}`]),
    ...old_lines.slice(old_lines.length - end).map((line) => ["same", ` ${line}`]),
  ];
}
