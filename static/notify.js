// Telling a person who looks elsewhere: the browser's notifications, asked for by a press and never by itself.

import { h } from "./dom.js";
import { prose_preview } from "./text.js";
import { button, heading, panel, refusal } from "./parts.js";
import { changed, state } from "./store.js";
import { post } from "./api.js";

const STORED = "hyperhive-notify";
let refused = false; // Chrome on Android has all of it, and throws when it comes to telling
const offered = () => "Notification" in window && isSecureContext && !refused;
const wanted = () => localStorage.getItem(STORED) === "yes";
const is_on = () => offered() && wanted() && Notification.permission === "granted";

/** The very thing in this page. */
const place_of = ({ kind, id, key }) => (kind === "approval" ? `#/approvals/${id}` : `#/call/${key}`);

let known = null; // keys that were told of, or seen when the page came

/** Called with each drawing: what is new since is told, unless the person looks at this page. */
export function tell_news(rows) {
  if (!state.ready) return;
  const fresh = known === null ? [] : rows.filter(({ key }) => !known.has(key));
  known = new Set(rows.map(({ key }) => key));
  if (document.hidden || !document.hasFocus()) fresh.forEach((row) => is_on() && tell(row));
}

function tell(row) {
  const more = { body: prose_preview(row.text, 200), tag: row.key, icon: "/static/icon.svg" };
  let shown;
  try {
    shown = new Notification("hyperhive: something waits for you", more);
  } catch {
    refused = true;
    return changed();
  }
  shown.onclick = () => {
    window.focus();
    location.hash = place_of(row);
    shown.close();
  };
}

async function switch_on() {
  const answer = await Notification.requestPermission();
  if (answer !== "granted") throw new Error("The browser does not allow it: its settings for this address decide.");
  localStorage.setItem(STORED, "yes");
}

function switch_off() {
  localStorage.removeItem(STORED);
  changed();
}

let tested = false;
const test = () =>
  post("/api/notify/test").then(() => {
    tested = true;
  });

export function notify_panel() {
  const here = is_on()
    ? button("notify", "Stop telling me here", async () => switch_off(), { kind: "small" })
    : button("notify", "Tell me in this browser", switch_on, { kind: "small", disabled: !offered() });
  return [
    heading("Notifications"),
    panel(
      { class: "pad" },
      h("div", { class: "buttons" }, here, button("notify:test", "Send a test to notify_url", test, { kind: "small" })),
      !offered() &&
        h("p", { class: "dim after" }, "Browsers tell only of pages that come over https or from this machine, and some on phones of none."),
      tested && h("p", { class: "ok after", role: "status" }, "The test was delivered."),
      refusal("notify"),
      refusal("notify:test"),
    ),
  ];
}
