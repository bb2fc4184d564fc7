// The renderer: views are functions that return plain descriptions (`h`), `render` makes the page equal
// to them and touches nothing else. So half-typed text, focus, selection and scroll survive every update.
//
// All text goes through `visible` here, in one place: what an agent writes is hostile, and no view can forget it.

const NODE = Symbol("description this element was made from");
const SLOT = Symbol("what it is known by among its siblings");
const SVG = "http://www.w3.org/2000/svg";

// ── Safe text ────────────────────────────────────────────────────────────────────────────────────

// Whole sequences only: one that never ends would take with it what follows.
const ANSI =
  /\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[PX^_][^\x1b\n]*\x1b\\|[ -/]*[0-OQ-WYZ\\`-~])/g;
const UNSEEN =
  /[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

function name_of(char) {
  const code = char.codePointAt(0);
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** Text as a person may trust it: ANSI sequences gone, control and direction characters spelled out. */
export function visible(text) {
  return String(text).replace(ANSI, "").replaceAll("\r\n", "\n").replace(UNSEEN, name_of);
}

/** For what is decided upon, a diff say: every character counts. No sequence can hide some, nor a joiner itself. */
export const exact = (text) => String(text).replaceAll("\x1b", "␛").replace(/[\u200c\u200d]/g, name_of);

// ── Descriptions ─────────────────────────────────────────────────────────────────────────────────

/** `h("p", {class: "dim", key: 7}, "text", child, [more], cond && child)` */
export function h(tag, props, ...children) {
  return { tag, props: props ?? {}, key: props?.key, children: slots(children) };
}

/** A part that is built again only when one of `deps` changed: long lists stay cheap. */
export function memo(key, deps, build) {
  return { key, deps, build };
}

/** [[slot, child]]: a child is known by its key, or by its place, which it keeps when one before it is left out. */
function slots(children, place = "", found = []) {
  children.forEach((child, index) => {
    if (Array.isArray(child)) slots(child, `${place}${index}.`, found);
    else if (child !== null && child !== undefined && child !== false && child !== "")
      found.push([child.key === undefined ? place + index : `=${child.key}`, child]);
  });
  return found;
}

// ── Making the page equal ────────────────────────────────────────────────────────────────────────

export function render(parent, ...wanted) {
  const focus = document.activeElement;
  const selection = focus && "selectionStart" in focus ? [focus.selectionStart, focus.selectionEnd] : null;
  reconcile(parent, slots(wanted));
  if (focus && focus !== document.activeElement && focus.isConnected && parent.contains(focus)) {
    focus.focus({ preventScroll: true });
    if (selection && selection[0] !== null) focus.setSelectionRange(...selection);
  }
}

function reconcile(parent, wanted) {
  const known = new Map([...parent.childNodes].map((dom) => [dom[SLOT], dom]));
  const reused = wanted.map(([slot, want]) => take(known, slot, want));
  const kept = new Set(reused);
  for (const dom of [...parent.childNodes]) if (!kept.has(dom)) dom.remove();
  let at = parent.firstChild;
  wanted.forEach(([slot, want], index) => {
    const old = reused[index];
    if (old && old === at) at = at.nextSibling;
    const dom = old ? update(old, want) : create(want, parent);
    dom[SLOT] = slot;
    if (dom.parentNode !== parent || (old && dom.nextSibling !== at)) parent.insertBefore(dom, at);
  });
}

function take(known, slot, want) {
  const dom = known.get(slot);
  if (!dom || (!want.build && dom[NODE].tag !== want.tag)) return null;
  known.delete(slot);
  return dom;
}

function same(a, b) {
  return a && b && a.length === b.length && a.every((value, index) => Object.is(value, b[index]));
}

function build(want) {
  return { ...want.build(), key: want.key, deps: want.deps };
}

function create(want, parent) {
  if (typeof want !== "object") return text_node(want);
  const node = want.build ? build(want) : want;
  const dom = document.createElementNS(node.tag === "svg" ? SVG : parent.namespaceURI, node.tag);
  set_props(dom, {}, node.props);
  dom[NODE] = node;
  if (node.children.length) reconcile(dom, node.children);
  if ("value" in node.props) dom.value = node.props.value;
  node.props.made?.(dom);
  return dom;
}

function text_node(text) {
  const dom = document.createTextNode(visible(text));
  dom[NODE] = { text: String(text) };
  return dom;
}

function update(dom, want) {
  const old = dom[NODE];
  if (typeof want !== "object") {
    if (old.text !== String(want)) dom.textContent = visible(want);
    old.text = String(want);
    return dom;
  }
  if (want.deps && same(old.deps, want.deps)) return dom;
  const node = want.build ? build(want) : want;
  if (node.tag !== old.tag) {
    const fresh = create(node, dom.parentNode);
    dom.replaceWith(fresh);
    return fresh;
  }
  set_props(dom, old.props, node.props);
  dom[NODE] = node;
  if (!customElements.get(node.tag)) reconcile(dom, node.children);
  return dom;
}

// `value` and `made` count once, when the element is made: afterwards what is typed belongs to the person.
const ONCE = new Set(["key", "value", "made"]);
const SPOKEN = new Set(["title", "aria-label", "placeholder", "alt"]);

function set_props(dom, old, props) {
  for (const name of new Set([...Object.keys(old), ...Object.keys(props)])) {
    if (ONCE.has(name) || Object.is(old[name], props[name])) continue;
    const value = props[name];
    if (name.startsWith("on")) dom[name] = value ?? null;
    else if (name === "vars") set_vars(dom, value ?? {});
    else if (value === undefined || value === null || value === false) dom.removeAttribute(name);
    else dom.setAttribute(name, value === true ? "" : SPOKEN.has(name) ? visible(value) : value);
  }
}

function set_vars(dom, vars) {
  for (const [name, value] of Object.entries(vars)) dom.style.setProperty(name, value);
}
