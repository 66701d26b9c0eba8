// The prompt, the final texts, and the tables beside the charts.

/** Chains with the same final text, the likeliest first. */
function groups(chains) {
  const found = new Map();
  chains.forEach((chain, c) => {
    const key = chain.text === null ? `chain ${c}` : `text ${chain.text}`;
    if (!found.has(key)) found.set(key, { ...chain, members: [] });
    found.get(key).members.push(c);
  });
  return [...found.values()].sort((a, b) => (b.log_p ?? -Infinity) - (a.log_p ?? -Infinity));
}

function answer(group, open) {
  const links = group.members.map((c) => make("button", { type: "button", class: "chain-link",
    "aria-label": `show chain ${c} step by step`, on: { click: () => open(c) } }, `${c}`));
  const facts = group.length === null ? "nothing drawn"
    : `log p ${number(group.log_p)} nats \u00b7 ${count(group.length, "token")} \u00b7 ${group.ending}`;
  const instead = group.length === null ? "" : "no tokenizer, no text";
  const text = make("p", { class: "answer-text clamped" }, group.text ?? instead);
  if (group.text !== null && !group.text.trim()) text.replaceChildren("(empty)");
  const more = make("button", { type: "button", class: "more", "aria-expanded": "false", hidden: true,
    on: { click: () => {
      const clamped = text.classList.toggle("clamped");
      more.textContent = clamped ? "Show all" : "Show less";
      more.setAttribute("aria-expanded", String(!clamped));
    } } }, "Show all");
  const errors = group.error ? make("p", { class: "failed" }, `Stopped early: ${group.error}`) : null;
  return make("li", { class: "answer" },
    make("p", { class: "answer-facts" },
      make("span", {}, group.members.length > 1 ? "chains " : "chain ", ...links), make("span", {}, facts)),
    text, more, errors);
}

const AT_FIRST = 6;

/** Show a prompt and its answers; `open(chain)` shows that chain step by step. */
function showAnswers(data, open) {
  $("prompt-text").textContent = data.text;
  const list = $("answers-list");
  const items = groups(data.chains).map((group) => answer(group, open));
  list.replaceChildren(...items.slice(0, AT_FIRST));
  const rest = items.slice(AT_FIRST);
  const all = $("more-answers");
  all.hidden = !rest.length;
  all.textContent = `Show ${rest.length} more`;
  all.onclick = () => {
    list.append(...rest);
    all.hidden = true;
    offerMore(rest);
    rest[0].querySelector("button").focus();
  };
  offerMore(items);
}

/** Show the button under answers that are cut short. */
function offerMore(items) {
  for (const text of items.map((item) => item.querySelector(".answer-text"))) {
    text.nextElementSibling.hidden = text.scrollHeight <= text.clientHeight + 1;
  }
}

function cells(tag, values) {
  const scope = (i) => (tag === "th" ? "col" : i ? null : "row");
  return values.map((value, i) => make(i ? tag : "th", { scope: scope(i) }, value));
}

/** A table from {head, rows} of strings or elements. */
function fillTable(table, { head, rows }) {
  table.replaceChildren(make("thead", {}, make("tr", {}, ...cells("th", head))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
}

const FIGURES = [["mean", "mean", 2], ["sd", "sd", 2], ["MCSE", "mcse", 3], ["R-hat", "rhat", 3],
  ["bulk ESS", "ess_bulk", 0], ["tail ESS", "ess_tail", 0], ["autocorrelation, steps", "tau", 1]];

function figureCell(row, name, digits) {
  const why = row.reasons[name];
  const cell = number(row[name], digits);
  return why ? make("span", { title: why }, cell, make("span", { class: "hidden" }, ` ${why}`)) : cell;
}

/** Warnings and the table of diagnostics of a prompt. */
function showDiagnostics(data, prompt) {
  fillTable($("diagnostics-table"), {
    head: ["of the draws", ...FIGURES.map(([title]) => title)],
    rows: data.diagnostics.map((row) => [row.name,
      ...FIGURES.map(([, name, digits]) => figureCell(row, name, digits))]),
  });
  const items = [...run.warnings, ...data.warnings].map((text) => make("li", {}, text));
  $("warnings").replaceChildren(...items);
  $("warnings-box").hidden = !items.length;
  const whose = run.prompts > 1 ? ` of prompt ${prompt}` : "";
  $("warnings-title").textContent = `Before you use these draws${whose}`;
  fillTable($("chains-table"), {
    head: ["chain", "steps", "accepted", "changed the path", "log p", "tokens", "end"],
    rows: data.chains.map((chain, c) => [`${c}`, whole(chain.steps),
      `${whole(chain.accepted)} (${percent(chain.accepted, chain.steps)})`,
      `${whole(chain.changed)} (${percent(chain.changed, chain.steps)})`,
      number(chain.log_p), whole(chain.length), chain.ending]),
  });
}
