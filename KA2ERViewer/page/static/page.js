// What the page needs in the browser: files in, shortcuts, and what to do when the connection is lost.
"use strict";
const ask = (name, ...values) => window.trame?.trigger(name, values);

// Where the socket is: without being told, trame first asks for a launcher, which is not there. It removes this again.
const told = new URL(location.href);
told.searchParams.set("sessionURL", new URL("ws", location.href).href.replace(/^http/, "ws"));
history.replaceState(null, "", told);

// -- files ------------------------------------------------------------------------------------------------------------

function choose(folder) {
  const input = document.createElement("input");
  input.type = "file";
  input.multiple = true;
  input.webkitdirectory = folder;
  input.hidden = true;
  input.onchange = () => { send([...input.files]); input.remove(); };
  input.oncancel = () => input.remove();
  document.body.append(input);
  input.click();
}
addEventListener("click", (event) => {
  const open = event.target.closest?.("[data-open]");
  if (open) choose(open.dataset.open === "folder");
});

async function send(files) {
  if (!files.length) return;
  const state = window.trame.state, total = files.reduce((sum, file) => sum + file.size, 0);
  const show = (text) => state.set("reading", text);
  let sent = 0;
  show("Sending…");
  try {
    const { batch } = await checked(fetch("upload", { method: "POST" }));
    for (const file of files) {
      const name = encodeURIComponent(file.name);
      await checked(fetch(`upload/${batch}?name=${name}`, { method: "PUT", body: file }));
      sent += file.size;
      show(`Sending… ${Math.round((100 * sent) / Math.max(1, total))} %`);
    }
    show("Reading…");
    await checked(fetch(`upload/${batch}/open`, { method: "POST" }));
  } catch (error) {
    state.set("error", error.message);
  } finally {
    show("");
  }
}

async function checked(request) {
  let answer;
  try { answer = await request; } catch { throw new Error("the connection was lost while files were sent. Try again."); }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.detail || `the viewer answered ${answer.status}. Try again.`);
  return body;
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader(), all = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return all;
    for (const one of some) all.push(...(await filesOf(one)));
  }
}

let hovering = 0;
const dropping = (on) => document.documentElement.classList.toggle("dropping", on);
addEventListener("dragenter", (event) => { event.preventDefault(); hovering += 1; dropping(true); });
addEventListener("dragleave", () => { hovering -= 1; if (hovering <= 0) dropping(false); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  hovering = 0;
  dropping(false);
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  send((await Promise.all(entries.map(filesOf))).flat());
});

// -- shortcuts --------------------------------------------------------------------------------------------------------

function pressed(event) {
  const parts = [];
  if (event.ctrlKey || event.metaKey) parts.push("ctrl");
  if (event.shiftKey) parts.push("shift");
  parts.push(event.key === "Escape" ? "esc" : event.key.toLowerCase());
  return parts.join("+");
}

addEventListener("click", (event) => {
  if (event.target.closest?.("[data-skip]")) {
    [...document.querySelectorAll(".view .remote-controlled-area")].find((area) => area.checkVisibility())?.focus();
  }
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const areaOf = (node) => node.closest?.(".remote-controlled-area");

// The keyboard in a view moves a crosshair and presses where it is: see cursor.py.
function pressedInView(event) {
  const name = areaOf(event.target)?.closest("[data-view]")?.dataset.view, arrow = ARROWS[event.key];
  if (!name || event.ctrlKey || event.metaKey) return false;
  if (event.key === "+" || event.key === "-") ask("zoom", name, event.key === "+");
  else if (arrow) name === "ThreeD" ? ask("turn", ...arrow) : ask("cursorMove", name, ...arrow, event.shiftKey);
  else if (name === "ThreeD") return false;
  else if (event.key === "Enter") event.repeat || ask("cursorPress", name, event.altKey);
  else if (event.key === "PageUp" || event.key === "PageDown") ask("cursorScroll", name, event.key === "PageUp" ? 1 : -1);
  else return false;
  return true;
}
addEventListener("pointerdown", (event) => {
  if (areaOf(event.target) && window.trame?.state.get("cursor_text")) ask("cursorHide");
}, true);

// What trame draws views into has no name and no role of its own.
new MutationObserver(() => {
  for (const area of document.querySelectorAll(".remote-controlled-area:not([role])")) {
    const view = area.closest("[data-view]");
    if (!view) continue;
    area.setAttribute("role", "application");
    area.setAttribute("aria-label", view.dataset.view === "ThreeD"
      ? "3D view: arrow keys turn it" : `${view.getAttribute("aria-label")}: arrow keys move the crosshair, Enter places`);
  }
}).observe(document, { childList: true, subtree: true });

addEventListener("keydown", (event) => {
  const into = event.target;
  if (pressedInView(event)) {
    event.preventDefault();
    event.stopPropagation();
    return;
  }
  if (into.closest?.("input[type=text], input[type=password], textarea, select, [role=dialog]") || event.altKey) return;
  const state = window.trame?.state;
  if (!state || document.querySelector(".v-overlay--active")) return; // an open menu has keys of its own
  if (event.key === "?") return void state.set("help", true);
  const keys = state.get("keys") || {}, key = pressed(event);
  const action = Object.keys(keys).find((name) => keys[name].toLowerCase() === key);
  if (!action) return;
  event.preventDefault();
  event.stopPropagation(); // Slicer's views have keys of their own
  ask(action);
}, true);

// -- the connection ---------------------------------------------------------------------------------------------------

const RealSocket = window.WebSocket;
window.WebSocket = class extends RealSocket {
  constructor(...given) {
    super(...given);
    this.addEventListener("close", (event) => lost(event.code));
    listenTo(this);
  }
};

// A network that goes away without a word closes nothing. So ask the server now and then, whatever the session does, and
// give up after two questions without an answer: one may fall into a moment in which the computer slept.
const PING = "ka2er?", PONG = "ka2er!", EVERY = 3000, UNANSWERED = 2;
function listenTo(socket) {
  let waiting = 0, asking = 0;
  const ask = () => {
    if (waiting === UNANSWERED) {
      socket.close();
      return void lost(0);
    }
    waiting += 1;
    socket.send(PING);
  };
  socket.addEventListener("message", (event) => {
    waiting = 0;
    if (event.data === PONG) event.stopImmediatePropagation(); // trame knows nothing of it
    asking ||= setInterval(() => (socket.readyState === RealSocket.OPEN ? ask() : clearInterval(asking)), EVERY);
  });
}

let leaving = false;
addEventListener("beforeunload", () => { leaving = true; });

function lost(code) {
  if (leaving || document.getElementById("lost")) return;
  const box = document.createElement("div");
  box.id = "lost";
  box.setAttribute("role", "alertdialog");
  const elsewhere = code === 4001;
  const words = elsewhere ? "This session is open in another tab." : "The connection was lost. Trying to get it back…";
  box.innerHTML = `<div><p>${words}</p><button type="button">${elsewhere ? "Use it here" : "Reload"}</button></div>`;
  const button = box.querySelector("button");
  button.onclick = () => location.reload();
  document.body.append(box);
  button.focus();
  if (!elsewhere) comeBack(box.querySelector("p"));
}

// Browsers keep six connections to a server, and use those first. When a network went away each of them may be dead, and
// only who waits for an answer finds out: so ask on all at once, and give up those that say nothing before the page loads.
const KEPT = 6;
async function comeBack(words) {
  const ask = () => fetch("alive", { cache: "no-store", signal: AbortSignal.timeout(5000) }).catch(() => null);
  for (;;) {
    await new Promise((done) => setTimeout(done, 1000));
    const answers = await Promise.all(Array.from({ length: KEPT }, ask));
    if (answers.some((one) => one?.ok)) return location.reload(); // all state is in the session's process: it comes back
    if (answers.some((one) => one?.status === 404)) {
      return void (words.textContent = "This session is over. Reload to begin another one.");
    }
  }
}
