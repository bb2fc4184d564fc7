// The views that a first look at Your call does without: they come when that is drawn, or at once to whoever goes there.

export { agent_view, agent_view_side, show_agent } from "./agent.js";
export { flow_view, load_thread, mark_read } from "./flow.js";
export { load_search, search_view } from "./search.js";
export { load_system, system_view } from "./system.js";
export { load_usage, usage_view } from "./usage.js";

// What those need, so that the browser asks for all of it together.
import "./find.js";
import "./graph.js";
import "./schedules.js";
import "./steps.js";
import "./tools.js";
import "./transcript.js";
