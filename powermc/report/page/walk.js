// One chain, step by step: a timeline to scrub, the step's facts, and the two tails it chose between.

/** What a step came to: a word for it, and a sentence. */
function verdict(walk, step) {
  const screened = walk.component && walk.component[step] === 0;
  const gated = walk.gated && walk.gated[step];
  const cut = walk.cut[step];
  switch (walk.verdict[step]) {
    case MOVED:
      return ["Accepted", `The path from token ${cut + 1} on was replaced.`];
    case SAME:
      return ["Nothing new", "The proposal equals the current path."];
    case STAGE1:
      return ["Rejected in stage 1", "The surrogate turned it down; the upper layers never ran on it."];
    case TURNED_DOWN:
      if (screened && !gated) return ["Rejected in stage 2", "It passed the surrogate; the full model turned it down."];
      return ["Rejected", "The full model turned it down."];
    case ABANDONED:
      return ["Abandoned", `After ${count(walk.proposal_length[step], "token")} it was sure to be rejected.`];
    case NULL:
      return ["No move", cut >= walk.length[step] ? "The cut lies past the end." : "Nothing could be proposed."];
    default:
      return ["Not taken", "The chain did not get here."];
  }
}

/** [[name, how far]]: 1 passed, 0 stopped there, null not reached. */
function stagesOf(walk, step) {
  const outcome = walk.verdict[step];
  if (outcome === NULL || outcome === NOT_TAKEN) return [];
  const screened = walk.component && walk.component[step] === 0 && !walk.gated[step];
  const done = outcome === MOVED || outcome === SAME;
  if (!screened) {
    const drawn = ["drawn", outcome === ABANDONED ? 0 : 1];
    return [drawn, ["accepted", outcome === ABANDONED ? null : Number(done)]];
  }
  const first = outcome === STAGE1 ? 0 : outcome === ABANDONED ? null : 1;
  const second = first === 1 ? Number(done) : null;
  return [["drawn", outcome === ABANDONED ? 0 : 1], ["stage 1", first], ["stage 2", second]];
}

function stageList(walk, step) {
  const items = stagesOf(walk, step).map(([name, got]) => {
    const state = got === null ? "not reached" : got ? "passed" : "stopped here";
    return make("li", { class: got === null ? "unreached" : got ? "passed" : "stopped", title: state },
      make("span", { class: "dot", "aria-hidden": "true" }), name, make("span", { class: "hidden" }, `: ${state}`));
  });
  return make("ol", { class: "stages", "aria-label": "how far the proposal came" }, ...items);
}

const LEVEL = "accepted, or passed on, where the log ratio is above it";

/** [[name, value, hint]]: log ratio and level on record, of the stage nearer to a tie, and what else is known. */
function ratios(walk, step) {
  if (walk.log_ratio[step] === null) return []; // nothing was decided
  const bound = walk.verdict[step] === ABANDONED ? ", at most" : "";
  const staged = walk.component && walk.component[step] === 0 && !walk.gated[step];
  const second = staged ? walk.log_ratio_2[step] : null;
  const level = ["level log u", walk.log_level[step], LEVEL];
  if (second !== null && walk.on_record_2[step]) return [["stage 2: log ratio", second], level];
  const first = [staged ? `stage 1: log ratio${bound}` : `log ratio${bound}`, walk.log_ratio[step]];
  return second === null ? [first, level] : [first, level, ["stage 2: log ratio", second]];
}

function factRows(walk, step) {
  const rows = [];
  const add = (term, value, unit, hint) => value !== undefined && rows.push([term, value, unit, hint]);
  const of = (name) => (walk[name] ? walk[name][step] : undefined);
  if (of("component") !== undefined && of("component") >= 0) {
    add("kernel", of("component") === 0 ? (of("gated") ? "screened, gated" : "screened") : "plain");
  }
  const cut = walk.cut[step];
  if (cut >= 0) add("cut", `before token ${cut + 1}`);
  add("proposed", whole(of("proposal_length")), of("proposal_length") === 1 ? "token" : "tokens");
  if (of("tokens") !== undefined) add("evaluated", whole(of("tokens")), of("tokens") === 1 ? "token" : "tokens",
    "tokens evaluated by the model in this step; the others were known already");
  for (const [name, value, hint] of ratios(walk, step)) add(name, number(value), "nats", hint);
  if (of("log_surrogate") !== null) add("\u0394 log surrogate", number(of("log_surrogate")), "nats");
  if (of("log_target") !== null) add("\u0394 log target", number(of("log_target")), "nats");
  const before = step > 0 ? walk.log_p[step - 1] : null;
  const grew = step > 0 && walk.block[step] !== walk.block[step - 1];
  const after = number(walk.log_p[step]);
  add("log p", before === null || grew || before === walk.log_p[step] ? after
    : `${number(before)} \u2192 ${after}`, "nats");
  add("length", whole(walk.length[step]), walk.length[step] === 1 ? "token" : "tokens");
  return rows;
}

function factList(walk, step) {
  return make("dl", {}, ...factRows(walk, step).map(([term, value, unit, hint]) =>
    make("div", { title: hint }, make("dt", {}, term),
      make("dd", {}, value, unit ? make("span", { class: "unit" }, ` ${unit}`) : null))));
}

function tail(title, part, start, view, role, walk) {
  const note = { wins: "in the chain after this step", loses: "dropped", same: "" }[role];
  const head = make("p", { class: "tail-title" }, make("strong", {}, title), note ? ` ${note}` : "");
  if (part === null) return make("div", { class: `tail ${role}` }, head, make("p", { class: "missing" }, "not kept"));
  const body = make("div", { class: "path", tabindex: "-1" });
  body.append(part.tokens.length ? spans(part, start, { ...view, changes: walk.changes }) : "nothing");
  return make("div", { class: `tail ${role}` }, head, body);
}

/** The kept part, and the tails below each other or side by side. */
function texts(walk, step, view) {
  const fragment = document.createDocumentFragment();
  const { kept, current, proposed } = walk.move(step);
  const changes = { ...view, changes: walk.changes };
  const outcome = walk.verdict[step];
  const shared = make("div", { class: "path kept" });
  if (kept === null) shared.append(make("span", { class: "missing" }, "This step's path was not kept (thinned)."));
  else shared.append(spans(kept, 0, changes));
  const still = outcome === NULL || outcome === NOT_TAKEN || walk.cut[step] < 0;
  if (!still) {
    const where = `cut before token ${walk.cut[step] + 1}`;
    shared.append(make("span", { class: "cut", role: "img", "aria-label": where, title: where }));
  } else if (current) shared.append(spans(current, kept.tokens.length, changes));
  if (walk.cut[step] !== 0 || still) fragment.append(shared);
  if (still) return fragment;
  const tails = make("div", { class: "tails" });
  const start = walk.cut[step];
  if (outcome === SAME) tails.append(tail("Current and proposed tail", current, start, changes, "same", walk));
  else {
    const moved = outcome === MOVED;
    tails.append(tail("Current tail", current, start, changes, moved ? "loses" : "wins", walk));
    const title = outcome === ABANDONED ? "Proposed tail, abandoned" : "Proposed tail";
    tails.append(tail(title, proposed, start, changes, moved ? "wins" : "loses", walk));
  }
  fragment.append(tails);
  return fragment;
}

/** One plain sentence for screen readers and the status line. */
function sentence(walk, step) {
  const [word, why] = verdict(walk, step);
  return `Step ${step + 1} of ${walk.steps}: ${word.toLowerCase()}. ${why}`;
}

/** Fill the step view. */
function showStep(walk, step, view) {
  for (const id of ["verdict", "facts", "texts"]) $(id).replaceChildren();
  if (!walk.steps) {
    $("texts").append(make("p", { class: "missing" }, "This chain took no step."));
    $("step-name").textContent = "";
    return;
  }
  const [word, why] = verdict(walk, step);
  const moved = walk.verdict[step] === MOVED;
  $("verdict").append(make("p", { class: moved ? "verdict moved" : "verdict" }, word),
    make("p", { class: "why" }, why), stageList(walk, step));
  $("facts").append(factList(walk, step));
  $("texts").append(texts(walk, step, view));
  $("step-name").textContent = `step ${whole(step + 1)} of ${whole(walk.steps)}, block ${walk.block[step] + 1}`;
  $("live").textContent = sentence(walk, step);
}
