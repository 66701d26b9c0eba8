// Small helpers. Text is only ever set as text: no markup is made from strings anywhere in this page.

const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const MINUS = "\u2212";

/** A number as people write it: a true minus sign, grouped thousands, a dash for none. */
function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  if (value === "inf") return "\u221e";
  if (value === "-inf") return `${MINUS}\u221e`;
  const places = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  const text = Math.abs(value).toLocaleString("en-US", places);
  return value < 0 && Number(text.replaceAll(",", "")) !== 0 ? MINUS + text : text;
}

const whole = (value) => number(value, 0);
const count = (n, noun) => `${whole(n)} ${noun}${n === 1 ? "" : "s"}`;
const percent = (part, all) => (all ? `${Math.round((100 * part) / all)}%` : "\u2013");

/** The colour that a custom property has now, as rgb(), for canvas and charts. */
function colour(name) {
  const probe = $("probe");
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

/** The same colour at this opacity. */
function faded(rgb, opacity) {
  const [r, g, b] = rgb.match(/[\d.]+/g);
  return `rgba(${r}, ${g}, ${b}, ${opacity})`;
}

/** `share` of a colour over the page's ground, opaque. */
function tint(rgb, share) {
  const ground = colour("--ground").match(/[\d.]+/g).map(Number);
  const mixed = rgb.match(/[\d.]+/g).slice(0, 3).map((v, i) => Math.round(share * v + (1 - share) * ground[i]));
  return `rgb(${mixed.join(", ")})`;
}
