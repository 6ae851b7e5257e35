// Conversations, kept in this browser. Each is a tree of messages: an edited message, or another
// answer, is a sibling of the first one, and `leaf` is the end of the branch that is shown.

const NAME = "receptance", TABLE = "conversations";
let opened;

function database() {
  opened ??= new Promise((done, fail) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => done(request.result);
    request.onerror = () => fail(request.error);
  });
  return opened;
}

async function ask(mode, act) {
  const table = (await database()).transaction(TABLE, mode).objectStore(TABLE);
  return new Promise((done, fail) => {
    const request = act(table);
    request.onsuccess = () => done(request.result);
    request.onerror = () => fail(request.error);
  });
}

export async function all() {
  const found = await ask("readonly", (table) => table.getAll());
  return found.sort((one, other) => other.changed - one.changed);
}

export function save(conversation) {
  conversation.changed = Date.now();
  return ask("readwrite", (table) => table.put(conversation));
}

export function remove(id) {
  return ask("readwrite", (table) => table.delete(id));
}

export function create(system) {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, system, nodes: [], leaf: -1, changed: 0 };
}

// A new message behind another one; its number is its place in `nodes`.
export function add(conversation, parent, role, text = "") {
  conversation.nodes.push({ parent, role, text, thought: "", tokens: [], ended: role === "user" });
  conversation.leaf = conversation.nodes.length - 1;
  return conversation.leaf;
}

// The numbers of the messages from the first one to a leaf.
export function branch(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let at = leaf; at >= 0; at = conversation.nodes[at].parent) found.unshift(at);
  return found;
}

export function siblings(conversation, number) {
  const parent = conversation.nodes[number].parent;
  return conversation.nodes.flatMap((node, at) => (node.parent === parent ? [at] : []));
}

// Show the branch through a message, to the end of what was said last behind it.
export function choose(conversation, number) {
  let leaf = number;
  for (let at = number + 1; at < conversation.nodes.length; at++) {
    if (conversation.nodes[at].parent === leaf) leaf = at;
  }
  conversation.leaf = leaf;
}

export function title(conversation) {
  const first = conversation.nodes.find((node) => node.role === "user");
  return first ? first.text.slice(0, 60) : "New conversation";
}
