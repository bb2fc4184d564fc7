// What stands around every view of both pages: the token field, the banner, following the end of a log.

import { h } from "./dom.js";
import { ago } from "./text.js";
import { keep_token } from "./api.js";
import { state } from "./store.js";
import { empty, logo, panel } from "./parts.js";

// ── Without a token ──────────────────────────────────────────────────────────────────────────────

export function token_view(message, where, retry) {
  const submit = (event) => {
    event.preventDefault();
    const text = new FormData(event.target).get("token").trim();
    if (!text) return;
    keep_token(text.replace(/^.*#token=/, "")); // the whole link will do, too
    retry();
  };
  return h(
    "main",
    { key: "token", class: "gate" },
    h(
      "form",
      { class: "panel pad", onsubmit: submit },
      h("div", { class: "brand" }, logo(), h("h1", null, "hyperhive")),
      message && h("p", { class: "refusal", role: "alert" }, message),
      h("label", { for: "token" }, "Paste the token of this page"),
      h(
        "div",
        { class: "decide" },
        h("input", {
          id: "token",
          name: "token",
          type: "password",
          class: "field",
          autocomplete: "off",
          spellcheck: "false",
          made: (dom) => setTimeout(() => dom.focus()),
        }),
        h("button", { class: "button main" }, "Open"),
      ),
      h("p", { class: "dim" }, where),
    ),
  );
}

export function connecting() {
  return h(
    "main",
    { key: "main", class: "page" },
    h("div", { class: "column-main" }, panel(null, empty("Connecting…"))),
  );
}

// ── The connection ───────────────────────────────────────────────────────────────────────────────

export function banner() {
  if (state.live || !state.ready) return null;
  return h(
    "div",
    { key: "banner", class: "banner", role: "status" },
    "Disconnected since ",
    ago(state.lost_at),
    ". What is shown may be old; trying again…",
  );
}

export function live_dot() {
  return h("span", { class: `dot ${state.live ? "" : "lost"}` });
}

// ── Following the end ────────────────────────────────────────────────────────────────────────────
// A view that grows at its end stays at the end, unless the person scrolled away from it.

const NEAR_PX = 80;
let following = false;
let own_scroll = false;

const page = document.documentElement;
const near_end = () => page.scrollHeight - innerHeight - scrollY < NEAR_PX;

addEventListener(
  "scroll",
  () => {
    if (!own_scroll) following = near_end();
    own_scroll = false;
  },
  { passive: true },
);

export function follow_from_now(yes) {
  following = yes;
}

/** Draws with `draw`, then puts the page and every log where the person had them: at the end, if they were there. */
export function draw_following(draw, follows) {
  const at_end = [...document.querySelectorAll("[data-follow]")].filter(
    (log) => log.scrollHeight - log.clientHeight - log.scrollTop < NEAR_PX,
  );
  const known = new Set(document.querySelectorAll("[data-follow]"));
  const was_following = following;
  draw();
  for (const log of document.querySelectorAll("[data-follow]"))
    if (at_end.includes(log) || !known.has(log)) log.scrollTop = log.scrollHeight;
  if (!follows || !was_following) return;
  following = true;
  if (page.scrollHeight - innerHeight - scrollY < 1) return;
  own_scroll = true;
  scrollTo({ top: page.scrollHeight, behavior: "instant" });
}
