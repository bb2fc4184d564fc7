// Nix told apart into words for colouring, line by line: small, and never wrong about the text itself.
// Nix ends a comment at a carriage return, too: here it is spelled out already (`visible`).
// A comment or a text over many lines carries on, so each line begins in the state the one before ended in.

const KEYWORDS = "assert else if in inherit let or rec then with true false null import throw abort";
const TOKEN = new RegExp(
  [
    String.raw`(?<comment>#[^␍]*|/\*.*?(?:\*/|$))`,
    String.raw`(?<string>"(?:[^"\\]|\\.)*(?:"|$)|''.*?(?:''(?!['$\\])|$))`,
    String.raw`(?<path>(?:\.{1,2}|~)?(?:/[\w.+-]+)+|<[\w.+/-]+>)`,
    String.raw`(?<number>\b\d+(?:\.\d+)?\b)`,
    String.raw`(?<keyword>\b(?:${KEYWORDS.replaceAll(" ", "|")})\b(?![-'.]))`,
    String.raw`(?<name>[A-Za-z_][\w'-]*(?=(?:\.[\w'"-]+)*\s*=(?!=)))`,
    String.raw`[A-Za-z_][\w'-]*`,
  ].join("|"),
  "gu",
);

// How what was begun on an earlier line ends.
const ENDS = { comment: /\*\//, string: /''(?!['$\\])/, quoted: /(?:[^"\\]|\\.)*?"/ };
const CLASS = { quoted: "string" };

/** One line as [[class or "", text]], and the state in which the next one begins. */
export function colour_line(line, state = "") {
  const out = [];
  let at = 0;
  if (state) {
    const end = ENDS[state].exec(line);
    if (!end) return { parts: [[CLASS[state] ?? state, line]], state };
    at = end.index + end[0].length;
    out.push([CLASS[state] ?? state, line.slice(0, at)]);
  }
  TOKEN.lastIndex = at;
  let goes_on = "";
  for (let match = TOKEN.exec(line); match; match = TOKEN.exec(line)) {
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    if (!kind) continue;
    if (match.index > at) out.push(["", line.slice(at, match.index)]);
    out.push([kind, match[0]]);
    at = TOKEN.lastIndex;
    goes_on = at === line.length ? open_at_end(kind, match[0]) : "";
  }
  if (at < line.length) out.push(["", line.slice(at)]);
  return { parts: out, state: goes_on };
}

function open_at_end(kind, text) {
  if (kind === "comment") return text.startsWith("/*") && !/^\/\*.*\*\/$/.test(text) ? "comment" : "";
  if (kind !== "string") return "";
  if (text.startsWith("''")) return /^''.*''$/.test(text) && text.length > 3 ? "" : "string";
  return /^"(?:[^"\\]|\\.)*"$/.test(text) ? "" : "quoted";
}
