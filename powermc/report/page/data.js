// What the page was given: JSON blocks, parsed when they are first looked at, and token ids packed in base64.

const blocks = new Map();

/** The parsed JSON block of this element id; null if the page has none. */
function block(id) {
  if (!blocks.has(id)) {
    const element = document.getElementById(id);
    blocks.set(id, element ? JSON.parse(element.textContent) : null);
  }
  return blocks.get(id);
}

const run = block("run");
const UNKNOWN = 65535; // a log p that was not kept

/** Little-endian unsigned integers of `bytes` bytes each. */
function unpack(text, bytes) {
  const raw = atob(text);
  const count = raw.length / bytes;
  const values = bytes === 4 ? new Uint32Array(count) : new Uint16Array(count);
  for (let i = 0; i < count; i++) {
    let value = 0;
    for (let b = bytes - 1; b >= 0; b--) value = value * 256 + raw.charCodeAt(i * bytes + b);
    values[i] = value;
  }
  return values;
}

/** Cut a packed array into pieces of the lengths given; null where a length is negative. */
function pieces(values, lengths) {
  let at = 0;
  return lengths.map((length) => (length < 0 ? null : values.subarray(at, (at += length))));
}

/** A chain: its steps as columns, and the path before and after each step, rebuilt from what changed. */
class Walk {
  constructor(prompt, chain) {
    const data = block(`chain-${prompt}-${chain}`);
    Object.assign(this, data.columns);
    this.steps = data.steps;
    this.proposals = pieces(unpack(data.proposals, run.bytes), data.proposalLengths);
    this.rebuild(data);
    this.changes = this.counted();
  }

  /** Paths are {tokens, scores}: ids into run.pieces, and -log p in millinats. Null where one was not kept. */
  rebuild(data) {
    const tails = pieces(unpack(data.tails, run.bytes), data.lengths);
    const scores = pieces(unpack(data.scores, 2), data.lengths);
    const starts = new Map(data.starts.map((step, i) => [step, data.startKeep[i]]));
    this.paths = [];
    this.befores = [];
    let at = 0;
    let last = { tokens: [], scores: [] };
    let found = null; // what the step finds: `last`, unless that is older
    const next = (keep) => {
      const i = at++;
      if (keep === null) return null;
      if (tails[i].length || keep !== last.tokens.length) {
        last = {
          tokens: [...last.tokens.slice(0, keep), ...tails[i]],
          scores: [...last.scores.slice(0, keep), ...scores[i]],
        };
      }
      return last;
    };
    data.keep.forEach((keep, step) => {
      if (starts.has(step)) found = next(starts.get(step));
      this.befores.push(found);
      this.paths.push((found = next(keep)));
    });
  }

  /** Per position, how many steps left another token there than they found. */
  counted() {
    const counts = [];
    this.paths.forEach((after, step) => {
      const before = this.before(step);
      if (!before || !after || before === after) return;
      const length = Math.max(before.tokens.length, after.tokens.length);
      for (let i = Math.max(this.cut[step], 0); i < length; i++) {
        if (before.tokens[i] !== after.tokens[i]) counts[i] = (counts[i] || 0) + 1;
      }
    });
    return counts;
  }

  /** The path that a step set out from; null where it is not known. */
  before(step) {
    return this.befores[step] || (this.verdict[step] === MOVED ? null : this.paths[step]);
  }

  /** {kept, current, proposed}: what a step shared, found and drew, each {tokens, scores}; null where not known. */
  move(step) {
    const cut = this.cut[step];
    const before = this.before(step);
    const after = this.paths[step];
    const basis = before || after;
    if (cut < 0) return { kept: basis, current: null, proposed: null };
    const current = before && slice(before, cut);
    let proposed = null;
    if (this.verdict[step] === MOVED) proposed = after && slice(after, cut);
    else if (this.verdict[step] === SAME) proposed = current;
    else if (this.proposals[step]) proposed = this.drawn(step, current);
    return { kept: basis && slice(basis, 0, cut), current, proposed };
  }

  /** The tail that a step drew; a substitution keeps what follows the tokens it draws. */
  drawn(step, current) {
    const tokens = [...this.proposals[step]];
    const substituted = run.substitution && this.component[step] === 0 && current;
    return { tokens: substituted ? [...tokens, ...current.tokens.slice(tokens.length)] : tokens, scores: [] };
  }
}

function slice(path, from, to) {
  return { tokens: path.tokens.slice(from, to), scores: path.scores.slice(from, to) };
}

// The outcomes of a step, as in walk.py.
const [NOT_TAKEN, MOVED, SAME, STAGE1, TURNED_DOWN, ABANDONED, NULL] = [0, 1, 2, 3, 4, 5, 6];

const walks = new Map();

/** The walk of a chain, decoded once. The last few are kept. */
function walkOf(prompt, chain) {
  const key = `${prompt}-${chain}`;
  if (!walks.has(key)) {
    if (walks.size > 8) walks.delete(walks.keys().next().value);
    walks.set(key, new Walk(prompt, chain));
  }
  return walks.get(key);
}
