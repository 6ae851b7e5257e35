// The chat page. Text of the model and of the user reaches the page as text nodes alone.

import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["temperature", "top_p", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];
const ALTERNATIVES = 5;

let conversations = [];
let current = store.create("");
let running = null; // { abort, conversation, number } while an answer is written

// ---- the server ---------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function said(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await said(response));
    const names = (await response.json()).data.map((model) => model.id);
    const before = $("model").value;
    $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(before)) $("model").value = before;
    tell("");
  } catch (error) {
    tell(`${error.message}`);
  }
}

function request(conversation, number) {
  // An answer that was stopped before its first word is no message.
  const messages = store.branch(conversation, conversation.nodes[number].parent)
    .map((at) => conversation.nodes[at]).filter((node) => node.text.trim())
    .map((node) => ({ role: node.role, content: node.text }));
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
  const body = { model: $("model").value, messages, stream: true };
  for (const name of SETTINGS) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if ($("probabilities").checked) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return body;
}

// The events of a stream, whose pieces may be cut anywhere.
async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    held += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
    if (done) throw new Error("the connection was lost before the end of the answer");
  }
}

async function answer(conversation, parent) {
  const number = store.add(conversation, parent, "assistant");
  const node = conversation.nodes[number];
  const abort = new AbortController();
  running = { abort, conversation, number };
  tell("");
  show();
  try {
    const body = JSON.stringify(request(conversation, number));
    const options = { method: "POST", headers: headers(), body, signal: abort.signal };
    const response = await fetch("v1/chat/completions", options);
    if (!response.ok) throw new Error(await said(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      node.text += choice.delta.content ?? "";
      node.thought += choice.delta.reasoning_content ?? "";
      for (const token of choice.logprobs?.content ?? []) {
        const others = token.top_logprobs.map((other) => [other.token, other.logprob]);
        node.tokens.push([token.token, token.logprob, token.bytes, others]);
      }
      grow(conversation, number);
    }
    $("status").textContent = `Answer: ${node.text}`;
  } catch (error) {
    if (error.name !== "AbortError") tell(`No answer: ${error.message}`);
    else $("status").textContent = "Stopped.";
  } finally {
    node.ended = true;
    running = null;
    await keep(conversation);
    show();
  }
}

// ---- what the user does -------------------------------------------------------------------------

function send(text) {
  if (running || !text.trim()) return;
  if (!current.nodes.length) {
    current.system = $("system").value;
    conversations.unshift(current);
  }
  const number = store.add(current, current.leaf, "user", text.trim());
  answer(current, number);
}

function stop() {
  running?.abort.abort();
}

function open(conversation) {
  current = conversation;
  $("system").value = conversation.system;
  show();
  $("messages").scrollTop = $("messages").scrollHeight;
}

async function keep(conversation) {
  try {
    await store.save(conversation);
  } catch {
    tell("This browser keeps no conversations; they are lost when the page is closed.");
  }
}

// ---- showing ------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function button(text, label, act, more = {}) {
  return make("button", { type: "button", "aria-label": label, title: label, onclick: act, ...more }, text);
}

function tell(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function show() {
  const busy = running !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("conversations").replaceChildren(...conversations.map((each) => listed(each, busy)));
  $("messages").replaceChildren(...store.branch(current).map((number) => message(number, busy)));
  bottom();
}

function listed(each, busy) {
  const name = store.title(each);
  const here = each === current;
  return make("li", {},
    make("button", { type: "button", class: "open", "aria-current": here ? "true" : "false", title: name, onclick: () => open(each) }, name),
    button("✕", `Delete the conversation “${name}”`, () => forget(each), { disabled: busy }));
}

async function forget(conversation) {
  if (!confirm(`Delete the conversation “${store.title(conversation)}”?`)) return;
  conversations = conversations.filter((each) => each !== conversation);
  await store.remove(conversation.id).catch(() => {});
  if (conversation === current) open(store.create($("system").value));
  else show();
}

function message(number, busy) {
  const node = current.nodes[number];
  const mine = node.role === "user";
  const writing = running?.number === number && running.conversation === current;
  const text = make("div", { class: writing ? "text waiting" : "text" });
  fill(text, node);
  if (!node.text && !writing) text.append(make("em", {}, "nothing was said"));
  const item = make("li", { class: node.role, id: `message-${number}` },
    make("p", { class: "who" }, mine ? "You" : "Model"));
  const thought = make("div", { class: "thought", hidden: !node.thought }, node.thought);
  item.append(thought, text, tools(number, node, mine, busy));
  return item;
}

function tools(number, node, mine, busy) {
  const bar = make("div", { class: "tools" });
  const same = store.siblings(current, number);
  if (same.length > 1) {
    const at = same.indexOf(number);
    const go = (to) => () => { store.choose(current, same[to]); keep(current); show(); };
    bar.append(
      button("‹", "The version before", go(at - 1), { disabled: busy || at === 0 }),
      `${at + 1} of ${same.length}`,
      button("›", "The version after", go(at + 1), { disabled: busy || at === same.length - 1 }));
  }
  if (mine) bar.append(button("Edit", "Edit this message, in a new branch", () => edit(number), { disabled: busy }));
  else bar.append(button("Retry", "Another answer, in a new branch", () => answer(current, node.parent), { disabled: busy }));
  bar.append(button("Copy", "Copy the text", () => navigator.clipboard?.writeText(node.text)));
  return bar;
}

function edit(number) {
  const node = current.nodes[number];
  const field = make("textarea", { class: "edit", rows: 4, "aria-label": "The edited message" });
  field.value = node.text;
  const done = (event) => {
    event.preventDefault();
    if (!field.value.trim() || running) return;
    answer(current, store.add(current, node.parent, "user", field.value.trim()));
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); show(); }
    if (event.key === "Enter" && !event.shiftKey) done(event);
  });
  const form = make("form", { onsubmit: done }, field,
    make("button", { type: "submit" }, "Send"), " ", button("Cancel", "Leave it as it was", show));
  $(`message-${number}`).querySelector(".text").replaceWith(form);
  field.focus();
}

// Show what an answer has grown by, without making the page anew.
function grow(conversation, number) {
  const item = $(`message-${number}`);
  if (conversation !== current || !item) return;
  const node = conversation.nodes[number];
  const thought = item.querySelector(".thought");
  thought.hidden = !node.thought;
  thought.textContent = node.thought;
  item.querySelector(".text").textContent = node.text;
  bottom();
}

function bottom() {
  const list = $("messages");
  if (list.scrollHeight - list.scrollTop - list.clientHeight < 120) list.scrollTop = list.scrollHeight;
}

// ---- probabilities ------------------------------------------------------------------------------

// The pieces of the text that belong to the tokens; nothing if they do not make up the text.
function pieces(node) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const texts = node.tokens.map(([, , bytes]) => decoder.decode(new Uint8Array(bytes), { stream: true }));
  texts[texts.length - 1] += decoder.decode(); // a character that was cut off
  const joined = texts.join("");
  const lead = joined.length - joined.trimStart().length;
  if (!joined.slice(lead).startsWith(node.text)) return [];
  let at = -lead;
  return texts.flatMap((text, number) => {
    const piece = node.text.slice(Math.max(0, at), Math.max(0, at + text.length));
    at += text.length;
    return piece ? [{ piece, number }] : [];
  });
}

function fill(element, node) {
  const found = node.ended && node.tokens.length ? pieces(node) : [];
  if (!found.length) {
    element.textContent = node.text;
    return;
  }
  element.tabIndex = 0;
  element.setAttribute("aria-label", `${node.text} (arrow keys tell the probabilities of the tokens)`);
  element.setAttribute("role", "group");
  const spans = found.map(({ piece, number }) => {
    const chance = Math.exp(node.tokens[number][1]);
    const level = Math.min(4, Math.floor(chance * 5));
    const span = make("span", { class: `token p${level}` }, piece);
    span.addEventListener("pointerenter", () => tip(span, node.tokens[number]));
    span.addEventListener("pointerleave", () => { $("tip").hidden = true; });
    return { span, number };
  });
  element.append(...spans.map(({ span }) => span));
  element.addEventListener("keydown", (event) => walk(event, element, node, spans));
  element.addEventListener("blur", () => here(element, null));
}

function percent(value) {
  const chance = 100 * Math.exp(value);
  return `${chance >= 10 ? chance.toFixed(0) : chance.toPrecision(2)} %`;
}

function told(token) {
  const shown = (text) => JSON.stringify(text);
  const lines = token[3].map(([text, value]) => `${percent(value).padStart(7)}  ${shown(text)}`);
  return `${shown(token[0])}: ${percent(token[1])}\n${lines.join("\n")}`;
}

function tip(span, token) {
  const box = $("tip");
  box.textContent = told(token);
  box.hidden = false;
  const place = span.getBoundingClientRect();
  const left = Math.min(place.left, innerWidth - box.offsetWidth - 8);
  const above = place.top - box.offsetHeight - 6;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${above > 0 ? above : place.bottom + 6}px`;
}

function here(element, span) {
  element.querySelector(".here")?.classList.remove("here");
  span?.classList.add("here");
  if (!span) $("tip").hidden = true;
}

function walk(event, element, node, spans) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const before = spans.findIndex(({ span }) => span.classList.contains("here"));
  const at = Math.max(0, Math.min(spans.length - 1, before < 0 ? 0 : before + step));
  const { span, number } = spans[at];
  here(element, span);
  tip(span, node.tokens[number]);
  $("status").textContent = told(node.tokens[number]).replaceAll("\n", ", ");
}

// ---- the beginning ------------------------------------------------------------------------------

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("input").value);
  $("input").value = "";
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("compose").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  if (!running) open(store.create($("system").value));
  $("input").focus();
});
$("system").addEventListener("change", () => {
  current.system = $("system").value;
  if (current.nodes.length) keep(current);
});
$("key").addEventListener("change", loadModels);
$("toggle-side").addEventListener("click", () => {
  const shown = $("side").classList.toggle("shown");
  $("toggle-side").setAttribute("aria-expanded", String(shown));
});

await loadModels();
try {
  conversations = await store.all();
} catch {
  conversations = [];
}
if (conversations.length) open(conversations[0]);
else show();
$("input").focus();
