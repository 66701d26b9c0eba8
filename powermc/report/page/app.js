// The page's state, and what changes it: menus, keys, clicks, the address.

const state = { prompt: 0, chain: 0, step: 0, mode: "log p", token: null };
const MODES = ["log p", "changes", "none"];
let charts = null;
let timeline = null;
let timer = null;

const walk = () => walkOf(state.prompt, state.chain);
const chainCount = () => block(`prompt-${state.prompt}`).chains.length;
const clamp = (value, most) => Math.min(Math.max(Number.isFinite(value) ? Math.trunc(value) : 0, 0), Math.max(most, 0));

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state.prompt = clamp(Number(asked.get("prompt")), run.prompts - 1);
  state.chain = clamp(Number(asked.get("chain")), chainCount() - 1);
  const last = walk().steps - 1;
  state.step = asked.has("step") ? clamp(Number(asked.get("step")) - 1, last) : last < 0 ? 0 : firstMove();
}

function writeAddress() {
  history.replaceState(null, "", `#prompt=${state.prompt}&chain=${state.chain}&step=${state.step + 1}`);
}

/** The first step that changed the path: something to see. */
function firstMove() {
  return Math.max(walk().verdict.indexOf(MOVED), 0);
}

function showWalk() {
  showStep(walk(), state.step, state);
  timeline.draw(walk(), state.step);
  state.token = null;
  $("readout").textContent = HINT;
  writeAddress();
}

const HINT = "Point at a token, or press , and . to go through them.";

function showPrompt() {
  $("prompt-menu").value = state.prompt;
  const menu = $("chain-menu");
  menu.replaceChildren(...Array.from({ length: chainCount() }, (_, c) => make("option", { value: c }, `${c}`)));
  showAnswers(block(`prompt-${state.prompt}`), (chain) => {
    setChain(chain);
    $("walk").scrollIntoView({ block: "start" });
    $("step").focus({ preventScroll: true });
  });
  showDiagnostics(block(`prompt-${state.prompt}`), state.prompt);
  charts.update();
  showChain();
}

function showChain() {
  $("chain-menu").value = state.chain;
  showWalk();
  charts.update(true);
}

function setPrompt(prompt) {
  stop();
  Object.assign(state, { prompt: clamp(prompt, run.prompts - 1), chain: 0 });
  state.step = firstMove();
  showPrompt();
}

function setChain(chain, step = null) {
  stop();
  state.chain = clamp(chain, chainCount() - 1);
  state.step = clamp(step ?? state.step, walk().steps - 1);
  showChain();
}

function setStep(step) {
  state.step = clamp(step, walk().steps - 1);
  showWalk();
}

/** To the next step in a direction that changed the path. */
function toMove(direction) {
  let step = state.step + direction;
  while (step >= 0 && step < walk().steps && walk().verdict[step] !== MOVED) step += direction;
  if (step >= 0 && step < walk().steps) setStep(step);
}

function stop() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-pressed", "false");
}

function play() {
  if (timer !== null) return stop();
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-pressed", "true");
  timer = setInterval(() => (state.step >= walk().steps - 1 ? stop() : setStep(state.step + 1)), 350);
  return undefined;
}

function setMode(mode) {
  state.mode = mode;
  document.querySelector(`input[name=mode][value="${mode}"]`).checked = true;
  document.body.dataset.mode = mode.replace(" ", "-");
  showWalk();
}

/** Mark a token and say what is known of it. */
function pick(span) {
  for (const other of document.querySelectorAll(".token.picked")) other.classList.remove("picked");
  state.token = span;
  if (!span) return;
  span.classList.add("picked");
  $("readout").textContent = about(span, walk());
}

function pickNext(direction) {
  const all = [...document.querySelectorAll("#texts .token")];
  if (!all.length) return;
  const at = all.indexOf(state.token);
  pick(all[at < 0 ? (direction > 0 ? 0 : all.length - 1) : clamp(at + direction, all.length - 1)]);
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  timeline.draw(walk(), state.step);
  charts.update();
}

const KEYS = {
  ArrowRight: (event) => (event.shiftKey ? toMove(1) : setStep(state.step + 1)),
  ArrowLeft: (event) => (event.shiftKey ? toMove(-1) : setStep(state.step - 1)),
  j: () => setChain(state.chain + 1),
  k: () => setChain(state.chain - 1),
  n: () => setPrompt(state.prompt + 1),
  p: () => setPrompt(state.prompt - 1),
  c: () => setMode(MODES[(MODES.indexOf(state.mode) + 1) % MODES.length]),
  ",": () => pickNext(-1),
  ".": () => pickNext(1),
  d: () => toggleTheme(),
  "?": () => $("help").showModal(),
};

/** Keys work everywhere but where the focused control has a use for them itself. */
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const own = event.target.closest("select, textarea, input:not([type=range]), pre[tabindex], .table-wrap");
  if (own && event.key !== "?") return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  stop();
  action(event);
}

function wire() {
  document.addEventListener("keydown", onKey);
  const clicks = {
    next: () => setStep(state.step + 1), previous: () => setStep(state.step - 1),
    "next-move": () => toMove(1), "previous-move": () => toMove(-1),
    play, theme: toggleTheme, "help-button": () => $("help").showModal(),
    "copy-configuration": copyConfiguration,
  };
  for (const [id, action] of Object.entries(clicks)) $(id)?.addEventListener("click", action);
  $("prompt-menu").addEventListener("change", (event) => setPrompt(Number(event.target.value)));
  $("chain-menu").addEventListener("change", (event) => setChain(Number(event.target.value)));
  $("step").addEventListener("input", (event) => setStep(Number(event.target.value)));
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => setMode(radio.value));
  }
  for (const event of ["pointerover", "click"]) {
    $("texts").addEventListener(event, ({ target }) => target.closest(".token") && pick(target.closest(".token")));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    timeline.draw(walk(), state.step);
    charts.update();
  });
  new ResizeObserver(() => timeline.draw(walk(), state.step)).observe($("timeline"));
  window.addEventListener("hashchange", () => {
    readAddress();
    showPrompt();
  });
}

function copyConfiguration() {
  const text = $("configuration-text").textContent;
  const said = (word) => ($("copy-configuration").textContent = word);
  if (!navigator.clipboard) return said("Select and copy by hand");
  return navigator.clipboard.writeText(text).then(() => said("Copied"), () => said("Select and copy by hand"));
}

timeline = new Timeline($("timeline-canvas"), $("step"));
readAddress();
charts = new Charts(state, setChain);
wire();
setMode(state.mode);
showPrompt();
performance.mark("powermc-ready");
document.documentElement.dataset.ready = "yes";
