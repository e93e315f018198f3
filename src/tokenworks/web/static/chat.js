// The chat page. It talks only to the gateway that served it, shows every answer as text and never
// as markup, and shows no number that was not measured here or told by the gateway.

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((it) => [it.id, it]));
const turns = [];
let state, current;
let follow = true;
let lastY = 0;

// What the page is doing. One row per state: what it says, and which control it offers.
const STATES = {
  loading: { says: "Looking for models…" },
  ready: { says: "" },
  waiting: { says: "Waiting for the first token…", offers: "stop" },
  answering: { says: "Answering…", offers: "stop" },
  unreachable: { says: "The gateway can’t be reached. Is it running?", offers: "retry" },
  refused: { says: "The gateway can’t list its models.", offers: "retry" },
  empty: { says: "The gateway has no model to talk to.", offers: "retry" },
  locked: { says: "This gateway asks for an API key.", offers: "unlock" },
};

function enter(next, says = STATES[next].says) {
  const { offers } = STATES[next];
  // A control that goes away must not take the keyboard's place with it.
  if (document.activeElement === page.stop && offers !== "stop") page.input.focus();
  state = document.body.dataset.state = next;
  page.status.textContent = says;
  for (const id of ["stop", "retry", "unlock"]) page[id].hidden = id !== offers;
  page.send.hidden = offers === "stop";
  page.model.disabled = !page.model.value;
  if (offers === "unlock") page.key.focus();
  // What shrinks the page scrolls it too; settled here, it can't be taken for the reader's hand.
  if (follow) setFollow(true);
  arm();
}

function arm() {
  page.send.disabled = state !== "ready" || page.input.value.trim() === "";
  page.fresh.disabled = turns.length === 0;
}

// Screen readers hear an answer once, whole; cleared, so that nobody comes across it twice.
function speak(text) {
  page.spoken.textContent = text;
  setTimeout(() => page.spoken.replaceChildren(), 5000);
}

// ---- Talking to the gateway

// Errors whose message is a sentence for a person; the status is HTTP's, or 0 where none came.
const failure = (message, status = 0) => Object.assign(new Error(message), { status });

// A browser may forbid storage; the key then lives as long as the page.
let kept = {};
try { kept = sessionStorage; } catch { /* forbidden */ }

async function ask(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (kept.apiKey) headers.Authorization = `Bearer ${kept.apiKey}`;
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : failure("The gateway can’t be reached.");
  });
  if (answer.ok) return answer;
  const { status } = answer;
  const said = (await answer.json().catch(() => null))?.error?.message;
  throw failure(said || `The gateway answered with HTTP status ${status}.`, status);
}

async function loadModels() {
  enter("loading");
  try {
    const answer = await ask("v1/models", { signal: AbortSignal.timeout(15_000) });
    const names = (await answer.json()).data.map(({ id }) => id);
    const chosen = page.model.value;
    if (names.length === 0) return enter("empty");
    page.model.replaceChildren(...names.map((id) => new Option(id, id, false, id === chosen)));
    enter("ready");
  } catch ({ status, message }) {
    if (status === 0) enter("unreachable");
    else if (status !== 401) enter("refused", `${STATES.refused.says} ${status ? message : ""}`);
    else enter("locked", kept.apiKey ? `That key was refused. ${message}` : STATES.locked.says);
  }
}

// Server-sent events as the standard has them: the data of each, and when its bytes arrived. All
// that came in one read has one time: the page can't know more.
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const at = performance.now();
    // A lone CR at the end may be half of a CRLF: it stays until the next read tells.
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line !== "" || data.length === 0) continue;
      yield { data: data.join("\n"), at };
      data = [];
    }
  }
}

// ---- One turn: a question and its answer

function newTurn(question) {
  const parts = page.turn.content.cloneNode(true);
  const [asked, view] = parts.children;
  const turn = { question, text: "", asked, view, at: (selector) => view.querySelector(selector) };
  asked.querySelector(".text").textContent = question;
  turn.at(".again").addEventListener("click", () => { page.input.focus(); run(turn); });
  page.welcome.hidden = true;
  page.talk.append(parts);
  turns.push(turn);
  return turn;
}

function request(turn) {
  const system = page.system.value.trim();
  // A question that got no answer is left out: many models insist that roles alternate.
  const before = turns.slice(0, turns.indexOf(turn)).filter(({ text }) => text);
  const says = (role, content) => ({ role, content });
  return {
    model: page.model.value,
    messages: [
      ...(system ? [says("system", system)] : []),
      ...before.flatMap(({ question, text }) => [says("user", question), says("assistant", text)]),
      says("user", turn.question),
    ],
    ...(page.temperature.value && { temperature: page.temperature.valueAsNumber }),
    ...(page.limit.value && { max_tokens: page.limit.valueAsNumber }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function run(turn) {
  const asked = request(turn);
  const controller = current = new AbortController();
  const { signal } = controller;
  Object.assign(turn, { text: "", locked: false });
  turn.at(".text").replaceChildren();
  turn.at(".model").textContent = asked.model;
  turn.at(".note").hidden = turn.at(".cost").hidden = true;
  turn.view.ariaBusy = "true";
  setFollow(true);
  enter("waiting");
  const body = JSON.stringify(asked);
  const seen = { sent: performance.now() };
  let note;
  try {
    const answer = await ask("v1/chat/completions", { method: "POST", body, signal });
    await receive(turn, answer.body, seen);
    if (seen.finish === "length") note = { says: "Ended at the token limit." };
    else if (!turn.text) note = { says: "The model gave an empty answer.", again: true };
  } catch (error) {
    let says = error.status === undefined ? "The connection broke." : error.message;
    if (error instanceof SyntaxError) says = "The gateway sent an event that can’t be read.";
    if (turn.text) says = `The answer was cut off. ${says}`;
    note = signal.aborted ? { says: "Stopped.", again: true } : { failed: true, says, again: true };
    turn.locked = error.status === 401;
    controller.abort();
  }
  // New chat may have taken the turn away, and the page be in another one already.
  if (turns.includes(turn)) end(turn, seen, note);
}

async function receive(turn, body, seen) {
  for await (const { data, at } of events(body)) {
    // Read on after it: to cancel the stream would tell the gateway that nobody wanted the answer.
    seen.done ||= data === "[DONE]";
    if (seen.done) continue;
    const { error, usage, choices } = JSON.parse(data);
    if (error) throw failure(error.message || "The gateway gave no reason.");
    seen.usage = usage ?? seen.usage;
    seen.finish = choices?.[0]?.finish_reason ?? seen.finish;
    const piece = choices?.[0]?.delta?.content;
    if (!piece) continue;
    seen.last = at;
    turn.text += piece;
    if (seen.first === undefined) {
      seen.first = at;
      enter("answering");
      showCost(turn, seen, "…");
    }
    paint();
  }
  if (!seen.done) throw failure("The stream ended early.");
}

function end(turn, seen, note) {
  render(turn);
  turn.view.ariaBusy = "false";
  turn.at(".note").hidden = !note;
  turn.at(".note").classList.toggle("failed", Boolean(note?.failed));
  turn.at(".note p").textContent = note?.says;
  turn.at(".again").hidden = !note?.again;
  if (turn.text) showCost(turn, seen, "not reported");
  speak(`${turn.text} ${note?.says ?? ""}`);
  enter(turn.locked ? "locked" : "ready");
}

function showCost(turn, { sent, first, last, usage }, unknown) {
  const number = (value, options) => value?.toLocaleString("en", options) ?? "?";
  const costs = { ttft: `${number(Math.round(first - sent))} ms`, tps: unknown, tokens: unknown };
  if (usage) {
    // The first token ends the wait; the speed is that of the tokens after it.
    const rate = (usage.completion_tokens - 1) / ((last - first) / 1000);
    const speed = `${number(rate, { maximumSignificantDigits: 3 })} tokens/s`;
    costs.tps = rate > 0 && rate < Infinity ? speed : "too short to measure";
    costs.tokens = `${number(usage.prompt_tokens)} in, ${number(usage.completion_tokens)} out`;
  }
  for (const name in costs) turn.at(`[data-metric="${name}"]`).textContent = costs[name];
  turn.at(".cost").hidden = false;
}

// ---- Showing text

// Text and fenced code, in turns. The rest of Markdown stays as the model wrote it.
function blocks(text) {
  const found = [{ tag: "p", lines: [] }];
  for (const line of text.split("\n")) {
    const { tag, lines } = found.at(-1);
    const fence = tag === "pre" ? /^\s*```\s*$/ : /^\s*```[^`]*$/;
    if (fence.test(line)) found.push({ tag: tag === "pre" ? "p" : "pre", lines: [] });
    else lines.push(line);
  }
  return found.map(({ tag, lines }) => ({ tag, text: lines.join("\n").replace(/^\n+|\s+$/g, "") }));
}

// Nodes are kept and text is added to them, so that a selection lives while the answer grows.
function render(turn) {
  const box = turn.at(".text");
  const found = blocks(turn.text);
  // What began like a fence may turn out to be none. Tags alternate, so those that stay still fit.
  while (box.children.length > found.length) box.lastChild.remove();
  found.forEach(({ tag, text }, index) => {
    if (!box.children[index]) {
      const node = document.createElement(tag);
      node.append("");
      // A wide block scrolls sideways: the keyboard must be able to reach it.
      if (tag === "pre") Object.assign(node, { tabIndex: 0, role: "group", ariaLabel: "Code" });
      box.append(node);
    }
    const shown = box.children[index].firstChild;
    if (text.startsWith(shown.data)) shown.appendData(text.slice(shown.length));
    else shown.data = text;
  });
}

// At most once a frame: a fast model outruns any screen. Only the last turn grows.
let painting = 0;
function paint() {
  painting ||= requestAnimationFrame(() => { painting = 0; turns.slice(-1).forEach(render); });
}

// The end stays in view until the reader scrolls up, and again once they are back.
function setFollow(yes) {
  follow = page.latest.hidden = yes;
  if (yes) scrollTo(0, document.body.scrollHeight);
  lastY = scrollY;
}
new ResizeObserver(() => { if (follow) setFollow(true); }).observe(document.body);
addEventListener("scroll", () => {
  const atEnd = document.documentElement.scrollHeight - innerHeight - scrollY < 2;
  if (atEnd || scrollY < lastY) follow = page.latest.hidden = atEnd;
  lastY = scrollY;
}, { passive: true });

// ---- What a person does

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (page.send.disabled) return;
  const turn = newTurn(page.input.value.trim());
  page.input.value = "";
  page.settings.open = false;
  page.input.focus();
  run(turn);
});

page.input.addEventListener("input", arm);
page.input.addEventListener("keydown", (event) => {
  // 229 is Safari's Enter that ends a composition: the composing flag is down by then.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!page.send.disabled) page.composer.requestSubmit();
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (!page.settings.open) return current?.abort();
  page.settings.open = false;
  page.settings.firstElementChild.focus();
});

// A setting that can't be sent is shown, not hidden behind a closed panel.
page.composer.addEventListener("invalid", () => { page.settings.open = true; }, true);
addEventListener("click", ({ target }) => {
  if (!page.settings.contains(target)) page.settings.open = false;
});

page.stop.addEventListener("click", () => { current.abort(); page.input.focus(); });
page.retry.addEventListener("click", () => { page.input.focus(); loadModels(); });
page.latest.addEventListener("click", () => { setFollow(true); page.input.focus(); });

page.fresh.addEventListener("click", () => {
  for (const { asked, view } of turns.splice(0)) { asked.remove(); view.remove(); }
  current?.abort();
  page.welcome.hidden = false;
  setFollow(true);
  speak("New chat.");
  page.input.focus();
  if (STATES[state].offers === "stop") enter("ready");
  arm();
});

page.unlock.addEventListener("submit", async (event) => {
  event.preventDefault();
  kept.apiKey = page.key.value.trim();
  page.key.value = "";
  await loadModels();
  if (state !== "ready") return;
  page.input.focus();
  if (turns.at(-1)?.locked) run(turns.at(-1));
});

loadModels();
page.input.focus();
