// The page that scaling/explore.py writes; DATA is what its explore() returns.

// {role: {quantity: value}} of a recipe: each quantity is a product of powers of the inputs
function calculate(recipe, inputs) {
  const scale = ({value, powers}) => Object.entries(powers).reduce(
    (product, [name, power]) => product * (inputs[name] / recipe.at[name]) ** power, value);
  const mapValues = (object, f) => Object.fromEntries(Object.entries(object).map(([key, item]) => [key, f(item)]));
  return mapValues(recipe.roles, quantities => mapValues(quantities, scale));
}

// The names of the inputs at which the recipe was not measured; 0.1% is for numbers typed with few digits
function outsideRange(recipe, inputs) {
  return Object.entries(recipe.measured).filter(([name, [low, high]]) =>
    !(inputs[name] >= low * 0.999 && inputs[name] <= high * 1.001)).map(([name]) => name);
}

const byId = id => document.getElementById(id);
const values = name => [...new Set(DATA.trials.map(trial => trial.settings[name]))].sort((a, b) => a < b ? -1 : 1);
const inputNames = () => Object.keys(DATA.trials[0].inputs);
let recipe = null;

// A number as a person reads it; a dash where there is none
function format(value) {
  if (value === undefined || Number.isNaN(value)) {
    return "–";
  }
  if (Number.isInteger(value)) {
    return value.toLocaleString("en");
  }
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);
}

function groupBy(items, keyOf) {
  const groups = new Map();
  items.forEach(item => groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]));
  return groups;
}

function describe({loss, failure, settings}) {
  const lines = Object.entries(settings).map(([name, value]) => `${name}: ${format(value)}`);
  return [`<b>${loss === null ? "diverged " + failure : "loss " + loss.toFixed(4)}</b>`, ...lines].join("<br>");
}

// {x, y} of lines of the mean over the seeds, each over trials that differ in `swept` and the seed alone; a
// point is left out where one of its trials diverged
function meanLines(trials, swept) {
  const x = [], y = [];
  for (const line of groupBy(trials, t => JSON.stringify({...t.settings, [swept]: 0, seed: 0})).values()) {
    const points = groupBy(line, trial => trial.settings[swept]);
    for (const value of [...points.keys()].sort((a, b) => a - b)) {
      const losses = points.get(value).map(trial => trial.loss ?? NaN);
      x.push(Math.log2(value));
      y.push(losses.reduce((a, b) => a + b) / losses.length);
    }
    x.push(null);  // a gap before the next line
    y.push(null);
  }
  return {x, y};
}

function draw() {
  const axis = byId("axis").value, swept = byId("swept").value, sizes = values(axis);
  const highlighted = sizes[byId("size").value - 1];
  const checked = name => values(name).filter(value => byId(`${name} ${value}`).checked);
  const panels = checked("parametrization"), seeds = checked("seed"), width = 1 / Math.max(panels.length, 1);
  const losses = DATA.trials.map(trial => trial.loss).filter(loss => loss !== null).sort((a, b) => a - b);
  const low = losses[0], high = losses[Math.floor(0.9 * (losses.length - 1))], margin = 0.05 * (high - low || 1);
  const onPaper = {xref: "paper", yref: "paper", showarrow: false};
  const xTitle = {...onPaper, text: `log2 ${swept} (${DATA.swept[swept]})`, x: 0.47, y: -0.08, yanchor: "top"};
  const traces = [], annotations = [{...xTitle, font: {size: 14}}];
  const layout = {annotations, uirevision: swept, hovermode: "closest", legend: {title: {text: axis}}, margin: {t: 40},
                  yaxis: {title: {text: DATA.loss}, range: [low - margin, high + 2 * margin]}};
  panels.forEach((parametrization, column) => {
    const number = column ? column + 1 : "";
    layout[`xaxis${number}`] = {domain: [column * width, (column + 0.95) * width], matches: column ? "x" : undefined};
    annotations.push({...onPaper, text: `<b>${DATA.titles[parametrization] ?? parametrization}</b>`,
                      x: (column + 0.47) * width, y: 1, yanchor: "bottom"});
    sizes.forEach((size, i) => {
      const trials = DATA.trials.filter(({settings}) => settings[axis] === size
        && settings.parametrization === parametrization && seeds.includes(settings.seed));
      const color = DATA.colors[axis][i], uid = `${parametrization}_${axis}_${size}`.replace(/\W/g, "_");
      const common = {xaxis: `x${number}`, name: `${size}`, legendgroup: `${size}`,
                      opacity: [undefined, size].includes(highlighted) ? 1 : 0.12};
      traces.push({...common, uid: `dots_${uid}`, mode: "markers", showlegend: column === 0, customdata: trials,
                   x: trials.map(trial => Math.log2(trial.settings[swept])),
                   y: trials.map(trial => trial.loss ?? high + margin),
                   text: trials.map(describe), hovertemplate: "%{text}<extra></extra>",
                   marker: {size: 8, color, symbol: trials.map(trial => trial.loss === null ? "x" : "circle")}});
      traces.push({...common, uid: `line_${uid}`, mode: "lines", showlegend: false, hoverinfo: "skip", line: {color},
                   ...meanLines(trials, swept)});
    });
  });
  byId("highlighted").textContent = `${axis} ${highlighted ?? "(all)"}`;
  Plotly.react("plot", traces, layout, {responsive: true, displaylogo: false});
}

function showSettings() {
  const inputs = Object.fromEntries(inputNames().map(name => [name, Number(byId(name).value) || NaN]));
  const range = (low, high) => low === high ? `only ${format(low)}` : `${format(low)} to ${format(high)}`;
  const outside = outsideRange(recipe, inputs), {forward, ...roles} = calculate(recipe, inputs);
  inputNames().forEach(name => byId(name).classList.toggle("outside", outside.includes(name)));
  byId("recipe").textContent = recipe.label && `Settings: ${recipe.label}.`;
  byId("warning").textContent = outside.length === 0 ? "All of these were measured, or lie between." :
    `Outside the measured range: ${outside.map(name => `${name} (${range(...recipe.measured[name])})`).join(", ")}.`;
  const columns = {std: "initial std", lr: "learning rate", weight_decay: "weight decay", eps: "Adam's eps"};
  const rows = [["role", ...Object.values(columns)], ...Object.entries(roles).map(([role, found]) =>
    [role, ...Object.keys(columns).map(name => format(found[name]))])];
  byId("roles").innerHTML = rows.map(row => `<tr><td>${row.join("</td><td>")}</td></tr>`).join("");
  byId("forward").textContent = `Forward pass: residual branches × ${format(forward.branch)}, logits × `
    + `${format(forward.logits)}, attention logits × ${format(forward.attention)}. Adam's beta2: `
    + `${format(Math.exp(-forward.minus_log_beta2))}.`;
}

function choose(trial) {
  if (DATA.recipes[trial.recipe]) {
    recipe = DATA.recipes[trial.recipe];
    inputNames().forEach(name => { byId(name).value = trial.inputs[name]; });
    showSettings();
  }
}

// The slider sets the calculator, too, where the size is one of its inputs
function highlight() {
  const axis = byId("axis").value, size = values(axis)[byId("size").value - 1];
  if (recipe && size !== undefined && inputNames().includes(axis)) {
    byId(axis).value = size;
    showSettings();
  }
}

function start() {
  const select = (id, names) => `<select id="${id}"><option>${names.join("<option>")}</select>`;
  const toggles = (name, most) => `<span>${name}: ` + values(name).map((value, i) =>
    `<label><input type="checkbox" id="${name} ${value}" ${i < most ? "checked" : ""}> ${value}</label>`).join(" ")
    + "</span>";
  byId("controls").innerHTML = `<label>a line for each ${select("axis", DATA.axes)}</label>`
    + `<label>against ${select("swept", Object.keys(DATA.swept))}</label>`
    + '<label>highlight <input type="range" id="size" min="0" value="0"> <b id="highlighted"></b></label>'
    + toggles("parametrization", 4) + toggles("seed", Infinity);  // of more panels none could be read
  byId("inputs").innerHTML = inputNames().map(name =>
    `<label>${name} <input type="number" id="${name}" min="0" step="any"></label>`).join(" ");
  const fitSlider = () => Object.assign(byId("size"), {max: values(byId("axis").value).length, value: 0});
  fitSlider();
  byId("axis").addEventListener("input", fitSlider);
  byId("size").addEventListener("input", highlight);
  byId("controls").addEventListener("input", draw);  // after the two above
  byId("inputs").addEventListener("input", () => recipe && showSettings());
  draw();
  byId("plot").on("plotly_click", event => choose(event.points[0].customdata));
  const finished = DATA.trials.filter(trial => trial.loss !== null && DATA.recipes[trial.recipe]);
  finished.sort((a, b) => a.loss - b.loss).slice(0, 1).forEach(choose);
}

if (typeof document !== "undefined") {
  start();
}
