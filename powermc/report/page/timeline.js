// The timeline: log p after each step, and below it a tick per step, taller the further its proposal came.

const HEIGHT = 120;
const LANE = 30; // of it, for the ticks
const EDGE = 4; // left free at either end, as the style does for the slider

/** How tall a step's tick is, 0 to 1. */
function reach(walk, step) {
  return { [MOVED]: 1, [SAME]: 0.5, [TURNED_DOWN]: 0.75, [STAGE1]: 0.5, [ABANDONED]: 0.3 }[walk.verdict[step]] || 0.1;
}

class Timeline {
  constructor(canvas, range) {
    this.canvas = canvas;
    this.range = range;
  }

  /** Draw a chain with the cursor at a step. */
  draw(walk, step) {
    const width = this.canvas.clientWidth;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(HEIGHT * scale);
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.clearRect(0, 0, width, HEIGHT);
    this.range.max = Math.max(walk.steps - 1, 0);
    this.range.value = step;
    this.range.disabled = !walk.steps;
    if (!walk.steps) return;
    const x = (i) => EDGE + (walk.steps > 1 ? (i * (width - 2 * EDGE)) / (walk.steps - 1) : 0);
    this.range.setAttribute("aria-valuetext", sentence(walk, step));
    this.blocks(pen, walk, x, width);
    this.trace(pen, walk, x);
    this.ticks(pen, walk, x, width);
    this.cursor(pen, x(step));
  }

  blocks(pen, walk, x, width) {
    pen.strokeStyle = colour("--line");
    pen.fillStyle = colour("--muted");
    pen.font = "11px system-ui, sans-serif";
    let last = -Infinity;
    for (let i = 0; i < walk.steps; i++) {
      if (i > 0 && walk.block[i] === walk.block[i - 1]) continue;
      const left = Math.round(x(Math.max(i - 0.5, 0))) + 0.5;
      if (i > 0) line(pen, left, 0, left, HEIGHT);
      if (left - last > 52 && left + 46 < width) {
        pen.fillText(`block ${walk.block[i] + 1}`, left + 5, 11);
        last = left;
      }
    }
  }

  trace(pen, walk, x) {
    const known = walk.log_p.filter((v) => typeof v === "number");
    if (!known.length) return;
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const y = (v) => 18 + (high > low ? (high - v) / (high - low) : 0.5) * (HEIGHT - LANE - 28);
    pen.strokeStyle = colour("--ink-soft");
    pen.lineWidth = 1.25;
    pen.lineJoin = "round";
    pen.beginPath();
    let level = 0;
    walk.log_p.forEach((v, i) => {
      if (typeof v !== "number") return;
      const start = i === 0 || walk.block[i] !== walk.block[i - 1];
      if (start) pen.moveTo(x(i), y(v));
      else pen.lineTo(x(i), level); // a chain stays where it is until it moves
      pen.lineTo(x(i), y(v));
      level = y(v);
    });
    pen.stroke();
  }

  ticks(pen, walk, x, width) {
    const thick = Math.max(1, Math.min(5, width / walk.steps - 1));
    const colours = { true: colour("--accent"), false: colour("--tick") };
    for (let i = 0; i < walk.steps; i++) {
      const height = reach(walk, i) * (LANE - 4);
      pen.fillStyle = colours[walk.verdict[i] === MOVED];
      pen.fillRect(x(i) - thick / 2, HEIGHT - height, thick, height);
    }
  }

  cursor(pen, at) {
    pen.strokeStyle = colour("--accent");
    pen.fillStyle = colour("--accent");
    pen.lineWidth = 1.5;
    line(pen, at, 0, at, HEIGHT);
    pen.beginPath();
    pen.arc(at, HEIGHT - LANE, 4, 0, 2 * Math.PI);
    pen.fill();
  }
}

function line(pen, x0, y0, x1, y1) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}
