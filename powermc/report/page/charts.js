// Charts, drawn by plotly when they come near the window: it is large, and reading tokens does not wait for it.

/** Run the embedded plotly, once. Its source lies inert in the page until it is needed. */
function plotly() {
  if (!window.Plotly) {
    const script = document.createElement("script");
    script.textContent = $("plotly-source").textContent;
    document.head.append(script);
  }
  return window.Plotly;
}

function palette() {
  const accent = colour("--accent");
  const ink = colour("--ink");
  return { accent, ink, muted: colour("--muted"), line: colour("--line") };
}

function axis(title, colours, more = {}) {
  return {
    title: { text: title, standoff: 8, font: { size: 12, color: colours.muted } },
    gridcolor: colours.line,
    zeroline: false,
    linecolor: colours.line,
    tickfont: { size: 11, color: colours.muted },
    automargin: true,
    fixedrange: false,
    ...more,
  };
}

function layout(colours, x, y, more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: colours.ink, size: 12 },
    margin: { l: 56, r: 12, t: 8, b: 44 },
    height: 280,
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    showlegend: false,
    legend: { orientation: "h", y: 1.12, x: 0, font: { size: 11, color: colours.muted } },
    xaxis: axis(...x),
    yaxis: axis(...y),
    ...more,
  };
}

const shortNumbers = { tickformat: "~s" };

/** A line per chain, ys[i] that of chains[i]: the chosen one in the accent colour and on top, the others grey. */
function lines(xs, ys, chosen, colours, unit, shape = "linear", chains = [...ys.keys()]) {
  const grey = faded(colours.muted, chains.length > 6 ? 0.22 : 0.45);
  const trace = (chain) => ({
    x: xs(chain),
    y: ys[chains.indexOf(chain)],
    mode: "lines",
    type: "scatter",
    name: `chain ${chain}`,
    meta: chain,
    line: { width: chain === chosen ? 1.8 : 1, color: chain === chosen ? colours.accent : grey, shape },
    hovertemplate: `chain ${chain}<br>%{x:,}: %{y:.2f} ${unit}<extra></extra>`,
  });
  const last = (chain) => Number(chain === chosen);
  return [...chains].sort((a, b) => last(a) - last(b)).map(trace);
}

const CHARTS = {
  trace(data, state, colours) {
    const steps = (chain) => data.log_p[chain].map((_, i) => i + 1);
    const marks = data.block_starts.slice(1).map((start) => ({
      type: "line", x0: start + 0.5, x1: start + 0.5, y0: 0, y1: 1, yref: "paper", layer: "below",
      line: { color: colours.line, width: 1, dash: "dot" },
    }));
    return [lines(steps, data.log_p, state.chain, colours, "nats", "hv"),
      layout(colours, ["step", colours], ["log p, nats", colours], { shapes: marks })];
  },

  spent(data, state, colours) {
    return [lines((chain) => data.spent[chain], data.log_p, state.chain, colours, "nats", "hv"),
      layout(colours, ["tokens evaluated for its steps so far", colours, shortNumbers], ["log p, nats", colours])];
  },

  ranks(data, state, colours) {
    const { chains, counts, expected } = data.ranks;
    const bins = () => counts[0].map((_, i) => i + 1);
    const level = { type: "line", x0: 0, x1: 1, xref: "paper", y0: expected, y1: expected,
      line: { color: colours.muted, width: 1, dash: "dash" } };
    const y = axis("draws", colours, { rangemode: "tozero" });
    return [lines(bins, counts, state.chain, colours, "draws", "hvh", chains),
      layout(colours, ["rank of log p, in bins from low to high", colours], ["draws", colours],
        { shapes: [level], yaxis: y })];
  },

  cuts(data, state, colours) {
    const { first, last, proposed, accepted, changed } = data.cuts;
    const bar = (name, counts, color) => ({
      type: "bar", name, x: first.map((_, i) => (first[i] + last[i]) / 2),
      width: first.map((_, i) => 0.88 * (last[i] - first[i] + 1)), y: counts.map((n, i) => (proposed[i] ? n / proposed[i] : null)),
      marker: { color }, 
      customdata: counts.map((n, i) => [n, proposed[i], first[i], last[i]]),
      hovertemplate: "cut before token %{customdata[2]} to %{customdata[3]}"
        + `<br>${name} %{customdata[0]:,} of %{customdata[1]:,}<extra></extra>`,
    });
    return [[bar("accepted", accepted, tint(colours.accent, 0.35)),
      bar("changed the path", changed, colours.accent)],
      layout(colours, ["cut before token", colours, { showgrid: false }],
        ["share of proposals", colours, { tickformat: ".0%", rangemode: "tozero" }],
        { barmode: "overlay", showlegend: true })];
  },

  funnel(data, state, colours) {
    const stages = data.funnel;
    const names = stages[0].counts.map((_, block) => `${block + 1}`);
    const traces = stages.map(({ name, counts }, i) => ({
      type: "bar", name, x: names, y: counts,
      marker: { color: tint(colours.accent, 0.16 + (0.84 * i) / Math.max(stages.length - 1, 1)) },
      hovertemplate: `block %{x}<br>${name}: %{y:,}<extra></extra>`,
    }));
    return [traces, layout(colours, ["block", colours, { type: "category", showgrid: false }],
      ["steps", colours, { rangemode: "tozero" }], { bargap: 0.2, bargroupgap: 0.08, showlegend: true })];
  },

  cost(data, state, colours) {
    const rows = run.cost.rows.filter((row) => row.amount > 0);
    const total = rows.reduce((sum, row) => sum + row.amount, 0);
    const trace = {
      type: "bar", orientation: "h", y: rows.map((row) => row.name), x: rows.map((row) => row.amount),
      text: rows.map((row) => percent(row.amount, total)), textposition: "outside", cliponaxis: false,
      textfont: { color: colours.muted, size: 11 },
      marker: { color: rows.map((row) => (row.head ? tint(colours.accent, 0.45) : colours.accent)) },
      hovertemplate: `%{y}: %{x:.3s} ${run.cost.unit}<extra></extra>`,
    };
    return [[trace], layout(colours, [run.cost.unit, colours, { ...shortNumbers, rangemode: "tozero" }],
      ["", colours, { autorange: "reversed", showgrid: false }],
      { height: 90 + 34 * rows.length, bargap: 0.35, margin: { l: 56, r: 48, t: 8, b: 44 } })];
  },
};

/** Draws charts when they come into view, and again when what they show changes. */
class Charts {
  constructor(state, jump) {
    this.state = state;
    this.jump = jump;
    this.near = new Set();
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "300px" });
    this.all = [...document.querySelectorAll("[data-chart]")];
    this.markedOnly = true;
    for (const element of this.all) this.observer.observe(element);
  }

  /** What the chart of this element shows; null where the prompt has nothing for it. */
  data(element) {
    const data = block(`prompt-${this.state.prompt}`);
    return element.dataset.chart === "cost" || data[SOURCE[element.dataset.chart]] ? data : null;
  }

  seen(entries) {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !this.near.has(target)) {
        this.near.add(target);
        this.draw(target);
      } else if (!isIntersecting) this.near.delete(target); // drawn anew when it comes back
    }
  }

  /** Draw what is in view again: all of it, or what a chain is marked in; soon, as the text comes first. */
  update(chainOnly = false) {
    this.markedOnly &&= chainOnly;
    for (const element of this.all) element.closest("figure").hidden = !this.data(element); // seen when it is back
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      const chosen = [...this.near].filter((element) => !this.markedOnly || MARKED.has(element.dataset.chart));
      this.markedOnly = true;
      for (const element of chosen) this.draw(element);
    }, 80);
  }

  draw(element) {
    const data = this.data(element);
    const name = element.dataset.chart;
    if (!data) return;
    const [traces, shape] = CHARTS[name](data, this.state, palette());
    plotly().react(element, traces, shape, { displayModeBar: false, responsive: true, scrollZoom: false });
    if (!element.dataset.wired) {
      element.dataset.wired = "yes";
      if (name === "trace") element.on("plotly_click", ({ points }) => this.jump(points[0].data.meta, points[0].x - 1));
    }
  }
}

const MARKED = new Set(["trace", "spent", "ranks"]); // with the chain that is looked at in colour
const SOURCE = { trace: "log_p", spent: "spent", ranks: "ranks", cuts: "cuts", funnel: "funnel" };
