// Tokens as coloured text: by how surprising they were, or by how often their position changed.

const DEEPEST = 4; // nats; more surprising tokens look the same

/** How strongly a token is coloured, 0 to 1; null where nothing is known. */
function strength(mode, score, changes, most) {
  if (mode === "none") return null;
  if (mode === "changes") return most ? changes / most : null;
  return score === undefined || score === UNKNOWN ? null : Math.min(score / 1000 / DEEPEST, 1);
}

/** Spans for these tokens. `start` is the position of the first one in its path. */
function spans(part, start, view) {
  const fragment = document.createDocumentFragment();
  const most = Math.max(0, ...view.changes.filter(Boolean));
  part.tokens.forEach((token, i) => {
    const piece = run.pieces[token];
    const span = make("span", { class: run.special.includes(token) ? "token special" : "token" });
    span.textContent = shown(piece);
    const position = start + i;
    const weight = strength(view.mode, part.scores[i], view.changes[position] || 0, most);
    if (weight !== null) span.style.setProperty("--weight", `${Math.round(weight * 50)}%`);
    span.dataset.position = position;
    span.dataset.token = token;
    if (part.scores[i] !== undefined) span.dataset.score = part.scores[i];
    fragment.append(span);
  });
  return fragment;
}

/** A piece with its white space made visible where it would be lost. */
function shown(piece) {
  if (piece === "") return "\u2205";
  return piece.replaceAll("\n", "\u21b5\n").replaceAll("\t", "\u21e5\t");
}

/** One line about a token, for the read-out. */
function about(span, walk) {
  const { position, token, score } = span.dataset;
  const parts = [`token ${Number(position) + 1}`, JSON.stringify(run.pieces[token])];
  if (score !== undefined && Number(score) !== UNKNOWN) {
    const logp = -Number(score) / 1000;
    parts.push(`log p ${number(logp)}`, `p ${Math.exp(logp).toPrecision(2)}`);
  }
  parts.push(`changed ${count(walk.changes[position] || 0, "time")}`);
  return parts.join("  \u00b7  ");
}
