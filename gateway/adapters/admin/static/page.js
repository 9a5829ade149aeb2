// The admin page: asks /api/v1/ again and again and shows the answers. Whatever comes from there is put into the page as
// text, by textContent; nothing here makes markup of a string. The token stays in this tab (sessionStorage) and goes
// out in a header only.

const DECISIONS_MS = 2000;
const STATUS_MS = 5000;
const SHOWN = 100;
const TOKEN = "mxgate-token";
const ACTIONS = {accepted: "good", quarantined: "warn", deferred: "warn", rejected: "bad", aborted: ""};
const OURS = {trouble: ["bad", "yes, trouble"], rule: ["warn", "yes, a rule"], no: ["", "no"]};

const $ = (id) => document.getElementById(id);
const text = (value) => (value === null || value === undefined ? "" : String(value));
const list = (value) => (Array.isArray(value) ? value : []);
const table = (value) => (value !== null && typeof value === "object" && !Array.isArray(value) ? value : {});

/** An element; children are elements and texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== ""));
  return element;
}

const badge = (kind, said) => make("span", {class: `badge ${kind}`}, said);

/** Says a text where it is not said yet, so that screen readers are told of changes only. */
function say(element, said) {
  if (element.textContent !== said) element.textContent = said;
}

/** Puts children in place of those that are there, unless they would look the same: focus and readers stay undisturbed. */
function put(element, ...children) {
  const next = element.cloneNode(false);
  next.append(...children);
  if (!element.isEqualNode(next)) element.replaceChildren(...children);
}

// --- asking ----------------------------------------------------------------------------------------------------

class Refused extends Error {}

async function ask(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "");
  const token = sessionStorage.getItem(TOKEN);
  const response = await fetch(path + (given.length ? `?${new URLSearchParams(given)}` : ""), {
    headers: token ? {Authorization: `Bearer ${token}`} : {},
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
  const answer = await response.json();
  if (response.status === 401) {
    wantToken(token ? "This is not the token." : "");
    throw new Refused();
  }
  if (response.status === 429) {
    wantToken("Too many wrong tokens came from here. Try again in a minute.");
    throw new Refused();
  }
  if (!response.ok) throw new Error(text(answer.error) || `status ${response.status}`);
  return answer;
}

let isOpen = true; // no token is waited for

function wantToken(error) {
  sessionStorage.removeItem(TOKEN);
  say($("login-error"), error);
  if (!isOpen) return;
  isOpen = false;
  $("login").hidden = false;
  $("content").hidden = true;
  $("forget").hidden = true;
  say($("ready"), "token wanted");
  $("ready").className = "badge";
  put($("facts"));
  say($("hostname"), "");
  say($("updated"), "");
  // nothing of what was shown stays behind in the page
  forgetRecords();
  for (const id of ["notices", "health", "traffic", "plan"]) put($(id));
  $("policies").tBodies[0].replaceChildren();
  $("token").focus();
}

function opened() {
  if (!isOpen) {
    isOpen = true;
    $("decisions-title").scrollIntoView({block: "nearest"});
    $("decisions").focus({preventScroll: true});
  }
  $("login").hidden = true;
  $("content").hidden = false;
  $("forget").hidden = !sessionStorage.getItem(TOKEN);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) {
    say($("login-error"), "A token is printable ASCII without blanks.");
    return;
  }
  sessionStorage.setItem(TOKEN, token);
  $("token").value = "";
  say($("login-error"), "");
  refresh();
});

$("forget").addEventListener("click", () => wantToken(""));

// --- status ----------------------------------------------------------------------------------------------------

function duration(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [size, unit] of units) if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  return `${Math.max(0, Math.floor(seconds))} s`;
}

const clock = (timestamp) => text(timestamp).replace("T", " ").replace(/\.\d+Z$/, "");

function showStatus(status) {
  const reasons = list(status.reasons).map(text);
  say($("hostname"), text(status.hostname));
  say($("ready"), status.ready ? "ready" : "not ready");
  $("ready").className = `badge ${status.ready ? "good" : "bad"}`;
  document.title = `${status.ready ? "" : "NOT READY "}mxgate ${text(status.hostname)}`;
  const facts = [
    ["version", text(status.version)],
    ["up for", duration(Number(status.uptime_s))],
    ["configuration", text(status.config_hash)],
    ["generation", text(status.generation)],
  ];
  put($("facts"), ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {class: "mono"}, value))));

  const workers = list(status.workers).map(table);
  const details = list(status.health).map(table);
  const notices = reasons.map((reason) => make("p", {class: "notice bad"}, `Not ready: ${reason}`));
  const reload = status.last_reload === null ? null : table(status.last_reload);
  if (reload && !reload.ok) {
    notices.push(make("p", {class: "notice bad"},
      `The reload of ${clock(reload.timestamp)} failed, the configuration before it is in force: ${list(reload.problems).map(text).join("; ")}`));
  }
  for (const key of list(reload && reload.needs_restart)) notices.push(make("p", {class: "notice"}, `${text(key)} has changed; it takes a restart.`));
  const hidden = new Set(details.map((worker) => text(table(table(worker.detail).clients).hidden_by)).filter(Boolean));
  for (const peer of hidden) notices.push(make("p", {class: "notice bad"}, `Nearly all clients seem to come from ${peer}: a balancer hides them.`));
  put($("notices"), ...notices);

  put($("health"), ...cards(status, workers, details, reload));
  const counts = table(status.transactions);
  put($("traffic"), ...Object.keys(ACTIONS).map((action) =>
    make("div", {}, make("dt", {}, action), make("dd", {}, number(counts[action])))));
  showPolicies(status, workers);
  say($("updated"), `Read-only. Updated ${new Date().toISOString().slice(11, 19)} UTC.`);
}

const number = (value) => (Number(value) || 0).toLocaleString("en");

function card(title, kind, word, ...lines) {
  return make("li", {}, make("h3", {}, title, badge(kind, word)), ...lines.filter(Boolean).map((line) => make("small", {}, line)));
}

function cards(status, workers, details, reload) {
  const shown = [];
  const sessions = workers.reduce((sum, worker) => sum + (Number(table(worker.status).sessions) || 0), 0);
  const silent = workers.filter((worker) => worker.error);
  shown.push(card("Workers", silent.length || !status.ready ? "bad" : "good", `${details.length} of ${text(status.wanted_workers)}`,
    `${sessions} sessions`, workers.length > details.length ? `${workers.length - details.length} old ones end their sessions` : "",
    ...silent.map((worker) => `worker ${text(worker.worker)}: ${text(worker.error)}`)));

  const hosts = new Map();
  for (const worker of details) for (const route of list(table(table(worker.detail).relay).routes)) for (const host of list(table(route).hosts)) {
    const key = `${text(route.name)}: ${text(host.host)}`;
    const all = hosts.get(key) || {up: 0, of: 0, errors: new Set(), used: 0};
    all.of += 1; all.up += host.up ? 1 : 0; all.used += Number(host.in_use) || 0;
    if (host.last_error) all.errors.add(text(host.last_error));
    hosts.set(key, all);
  }
  for (const [name, all] of hosts) {
    const kind = all.up === all.of ? "good" : all.up ? "warn" : "bad";
    shown.push(card("Downstream", kind, all.up === all.of ? "up" : all.up ? `up for ${all.up} of ${all.of}` : "down", name,
      `${all.used} connections in use`, all.errors.size ? `last error: ${[...all.errors].join(", ")}` : ""));
  }

  const dns = details.map((worker) => table(table(worker.detail).dns)).filter((each) => each.nameservers);
  if (dns.length) {
    const unanswered = Math.max(...dns.map((each) => Number(each.unanswered) || 0));
    shown.push(card("DNS", unanswered > 2 ? "bad" : unanswered ? "warn" : "good", unanswered > 2 ? "not answering" : unanswered ? "unsteady" : "answers",
      list(dns[0].nameservers).map(text).join(", "), unanswered ? `unanswered in sequence: ${unanswered}` : ""));
  }

  const stores = details.map((worker) => table(table(worker.detail).store)).filter((each) => each.kind);
  if (stores.length) {
    const down = stores.filter((each) => !each.up);
    shown.push(card("Store", down.length ? "bad" : "good", down.length ? "out of reach" : "up", text(stores[0].kind),
      ...new Set(down.map((each) => text(each.last_error)))));
  } else shown.push(card("Store", "", "not needed", "no policy that runs remembers"));

  const certificates = details.map((worker) => table(table(worker.detail).tls)).filter((each) => "last_error" in each);
  if (certificates.length) {
    const errors = new Set(certificates.map((each) => text(each.last_error)).filter(Boolean));
    shown.push(card("Certificate", errors.size ? "bad" : "good", errors.size ? "not renewed" : "in use", ...errors));
  }

  shown.push(card("Configuration", reload && !reload.ok ? "bad" : "good", reload && !reload.ok ? "reload failed" : "in force",
    text(status.config_file), `loaded ${clock(status.config_loaded)}`, reload ? `last reload ${clock(reload.timestamp)}` : "not reloaded since the start"));
  return shown;
}

function showPolicies(status, workers) {
  const answered = workers.map((worker) => table(worker.status)).find((each) => each.plan);
  const plan = table(answered && answered.plan);
  const counts = table(status.policies);
  const policies = list(plan.policies).map(table);
  const rows = policies.map((policy) => {
    const said = table(counts[policy.name]);
    const decisions = table(said.decisions);
    const would = Object.entries(table(said.would)).filter(([action, count]) => action !== "continue" && count).map(([action, count]) => `${action} ${number(count)}`);
    const failures = Number(said.failures) || 0;
    return make("tr", {},
      make("th", {scope: "row"}, text(policy.name)),
      make("td", {}, badge(policy.mode === "enforce" ? "good" : policy.mode === "observe" ? "warn" : "", text(policy.mode))),
      ...["continue", "quarantine", "defer", "reject"].map((action) => make("td", {class: "n"}, number(decisions[action]))),
      make("td", {}, would.join(", ") || "\u2013"),
      make("td", {class: "n"}, failures ? badge("bad", number(failures)) : "0"));
  });
  put($("policies").tBodies[0], ...rows);

  const stages = Object.entries(table(plan.stages)).filter(([, stage]) => list(table(stage).ranks).length);
  put($("plan"), ...stages.map(([name, stage]) => make("li", {},
    make("span", {class: "stage"}, name),
    ...list(stage.ranks).flatMap((rank, at) => [
      ...(at ? [make("span", {class: "quiet"}, "then")] : []),
      make("span", {class: "step"}, list(rank).map(text).join(" + ")),
    ]))));

  const select = $("f-policy");
  const known = new Set([...select.options].map((option) => option.value));
  for (const policy of policies) if (!known.has(policy.name)) select.append(make("option", {}, text(policy.name)));
}

// --- decisions -------------------------------------------------------------------------------------------------

const rows = new Map(); // by tx: the row, and its detail where it is open
let filters = {};
let isPaused = false;
let isFirst = true;

function forgetRecords() {
  $("records").tBodies[0].replaceChildren();
  rows.clear();
  isFirst = true;
}

function reply(record) {
  return record.code ? [record.code, record.enhanced, record.text].map(text).filter(Boolean).join(" ") : "no answer: the client was gone";
}

function because(record) {
  return [record.policy, record.reason].map(text).filter(Boolean).join(" ");
}

function ours(record) {
  const [kind, word] = OURS[text(record.ours)] || ["good", "\u2013"];
  return badge(kind, word);
}

function address(value) {
  return `<${text(value)}>`;
}

function makeRow(record) {
  const rcpts = list(record.rcpts).map(table);
  const more = rcpts.length + (Number(record.omitted_rcpts) || 0) - 1;
  const open = make("button", {type: "button", class: "open", "aria-expanded": "false"}, text(record.tx));
  open.setAttribute("aria-label", `Details of ${text(record.tx)}`);
  const row = make("tr", {},
    make("td", {}, make("time", {datetime: text(record.timestamp)}, clock(record.timestamp)), open),
    make("td", {}, badge(ACTIONS[text(record.action)] || "", text(record.action))),
    make("td", {class: "mono"}, text(record.client), make("small", {}, text(record.helo))),
    make("td", {}, address(record.mail_from), make("small", {}, rcpts.length ? `to ${address(rcpts[0].rcpt)}${more > 0 ? ` and ${more} more` : ""}` : "no recipient")),
    make("td", {}, reply(record), make("small", {}, text(record.why) || because(record))),
    make("td", {"data-label": "Is it us?"}, ours(record)));
  open.addEventListener("click", () => toggle(text(record.tx)));
  return {row, open, detail: null};
}

async function toggle(tx) {
  const entry = rows.get(tx);
  if (!entry) return;
  if (entry.detail) {
    entry.detail.remove();
    entry.detail = null;
    entry.open.setAttribute("aria-expanded", "false");
    return;
  }
  const cell = make("td", {colspan: "6"}, "asking\u2026");
  entry.detail = make("tr", {class: "detail", id: `detail-${tx}`}, cell);
  entry.row.after(entry.detail);
  entry.open.setAttribute("aria-expanded", "true");
  entry.open.setAttribute("aria-controls", entry.detail.id);
  try {
    cell.replaceChildren(...detail(await ask(`api/v1/decisions/${encodeURIComponent(tx)}`)));
  } catch (error) {
    if (!(error instanceof Refused)) cell.replaceChildren(`It cannot be shown: ${error.message}`);
  }
}

function facts(pairs) {
  return make("dl", {}, ...pairs.filter(([, value]) => value !== "").flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function detail(record) {
  const timings = Object.entries(table(record.timings_ms)).map(([name, spent]) => `${name} ${spent} ms`).join(", ");
  const shown = [facts([
    ["why", text(record.why)],
    ["decided by", `${because(record) || "nobody; all let it pass"} at ${text(record.stage)}`],
    ["error", text(record.error)],
    ["client", [record.client, record.helo, record.tls, record.trust].map(text).filter(Boolean).join(", ")],
    ["authentication", list(record.results).map((each) => `${text(each.method)}=${text(each.result)}`).join(" ")],
    ["route", text(record.route)],
    ["size", `${number(record.size_bytes)} octets`],
    ["took", `${text(record.duration_ms)} ms${timings ? ` (${timings})` : ""}`],
    ["worker", text(record.worker)],
  ])];
  const rcpts = list(record.rcpts).map(table);
  if (rcpts.length) shown.push(make("h3", {}, "Recipients"), make("ul", {}, ...rcpts.slice(0, 50).map((each) =>
    make("li", {}, `${address(each.rcpt)}: ${reply(each)}${because(each) ? ` [${because(each)}]` : ""}`))));
  const verdicts = list(record.verdicts).map(table);
  if (verdicts.length) shown.push(make("h3", {}, "Verdicts"), make("ul", {}, ...verdicts.map(verdict)));
  const dns = list(record.dns).map(table);
  if (dns.length) shown.push(make("h3", {}, "DNS"), make("ul", {}, ...dns.map((asked) => make("li", {class: "mono"},
    [asked.name, asked.rrtype, asked.answer === "records" ? list(asked.records).map(text).join(" | ") : text(asked.answer).replaceAll("_", " "), asked.why].map(text).filter(Boolean).join(" ")))));
  const header = list(record.header).map(table);
  if (header.length) shown.push(make("h3", {}, "Header fields that policies judge"), make("ul", {}, ...header.map((field) =>
    make("li", {class: "mono"}, `${text(field.name)}: ${text(field.value)}`))));
  return shown;
}

function words(...parts) {
  return parts.map(text).filter(Boolean).join(" ");
}

function verdict(each) {
  const would = each.would_be === null ? null : table(each.would_be);
  const results = list((would || each).results).map((found) => `${text(found.method)}=${text(found.result)}${found.reason ? ` (${text(found.reason)})` : ""}`);
  const item = make("li", {},
    `${text(each.stage)} ${text(each.policy)}: ${words(each.action, each.reason)}`,
    each.rcpt ? ` for ${address(each.rcpt)}` : "",
    each.failure ? ` FAILED (${text(each.failure)})` : "",
    would ? `, observed: would have been ${words(would.action, would.reason)}` : "",
    results.length ? `; ${results.join(" ")}` : "",
    ` (${text(each.duration_ms)} ms)`);
  const evidence = list(each.evidence);
  if (evidence.length) item.append(make("ul", {}, ...evidence.map((line) => make("li", {class: "mono"}, text(line)))));
  return item;
}

function showDecisions(answer) {
  const records = list(answer.decisions).map(table);
  const body = $("records").tBodies[0];
  for (const record of [...records].reverse()) {
    const tx = text(record.tx);
    if (rows.has(tx)) continue;
    const entry = makeRow(record);
    if (!isFirst) entry.row.className = "new";
    rows.set(tx, entry);
    body.prepend(entry.row);
  }
  isFirst = false;
  for (const [tx, entry] of rows) {
    if (rows.size <= SHOWN) break;
    // what somebody reads stays
    if (entry.detail || entry.row.contains(document.activeElement)) continue;
    entry.row.remove();
    rows.delete(tx);
  }
  $("none").hidden = rows.size > 0;
  const missing = list(answer.errors).length ? "; a worker did not answer" : "";
  say($("found"), `${rows.size} shown${answer.truncated ? ", there are more" : ""}${missing}`);
  say($("filter-error"), "");
}

$("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  filters = Object.fromEntries([...new FormData(event.target)].map(([name, value]) => [name, value.trim()]));
  forgetRecords();
  isPaused = false;
  showPause();
  askDecisions();
});
$("filters").addEventListener("reset", () => {
  filters = {};
  forgetRecords();
  askDecisions();
});

function showPause() {
  $("pause").setAttribute("aria-pressed", String(isPaused));
}
$("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  showPause();
});

// --- again and again -------------------------------------------------------------------------------------------

async function askDecisions() {
  const asked = filters;
  try {
    const answer = await ask("api/v1/decisions", {...asked, limit: String(SHOWN)});
    if (asked === filters && isOpen) showDecisions(answer);
  } catch (error) {
    if (!(error instanceof Refused) && asked === filters) say($("filter-error"), error instanceof TypeError ? "The gateway does not answer." : error.message);
  }
}

async function askStatus() {
  try {
    const status = await ask("api/v1/status");
    opened();
    showStatus(status);
  } catch (error) {
    if (error instanceof Refused) return;
    say($("ready"), "no answer");
    $("ready").className = "badge bad";
  }
}

async function refresh() {
  await askStatus();
  if (isOpen) await askDecisions();
}

/** Calls it at intervals while somebody looks; a call that is under way is waited for. */
function often(call, everyMs, isWanted) {
  setTimeout(async () => {
    if (isWanted()) await call();
    often(call, everyMs, isWanted);
  }, everyMs);
}

refresh();
often(askStatus, STATUS_MS, () => isOpen && document.visibilityState === "visible");
often(askDecisions, DECISIONS_MS, () => isOpen && !isPaused && document.visibilityState === "visible");
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && isOpen) refresh();
});
