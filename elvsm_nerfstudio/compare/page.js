"use strict";
const { result, colours, metrics, costs } = JSON.parse(document.getElementById("content").textContent);
const TRUTH = "ground truth";
const find = (id) => document.getElementById(id);
const byName = Object.fromEntries(result.methods.map((method) => [method.name, method]));
const sceneByName = Object.fromEntries(result.scenes.map((scene) => [scene.name, scene]));
const recordOf = {};
for (const record of result.records) recordOf[[record.method, record.context_views, record.scene]] = record;

const state = {
  count: result.context_views.at(-1),
  scene: result.scenes[0].name,
  target: Object.fromEntries(result.scenes.map((scene) => [scene.name, 0])),
  left: TRUTH,
  right: null,
  metric: metrics[0].key,
  scoreSort: { key: null, descending: true },
  sceneSort: { key: null, descending: true },
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Where pictures are

const path = (...parts) => parts.map(encodeURIComponent).join("/");
const file = (frame) => `${String(frame).padStart(5, "0")}.png`;
const photo = (scene, kind, frame) => path("images", scene, kind, file(frame));
const picture = (method, scene, kind, frame) =>
  path("methods", byName[method].folder, `${state.count}_views`, scene, kind, file(frame));
const shown = (name, scene, frame) =>
  name === TRUTH ? photo(scene, "target", frame) : picture(name, scene, "target", frame);

// Numbers

const recordFor = (method, scene) => recordOf[[method, state.count, scene]];
const isDone = (method, scene) => recordFor(method, scene)?.status === "done";
const summaryOf = (method) => method.summaries[String(state.count)];
const metricOf = (key) => metrics.find((metric) => metric.key === key);
const scoreOf = (method, scene, key) => summaryOf(byName[method]).scenes?.[scene]?.[key] ?? null;
const perImage = (method, scene, key) =>
  isDone(method, scene) ? recordFor(method, scene).images[state.target[scene]][key] : null;

function costOf(method, key) {
  const value = summaryOf(method)[key];
  if (value === undefined) return null;
  return typeof value === "object" ? value.median : value / 2 ** 20;
}
function threeDigits(value) {
  if (value === null) return "";
  if (value !== 0 && value < 0.001) return "< 0.001";
  return value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

/** Sorted by value; what has none comes last in both orders. */
function sorted(items, value, descending) {
  return items.slice().sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return descending ? -order : order;
  });
}

function heading(label, key, sort, firstDescending, redraw) {
  const active = sort.key === key;
  const click = () => {
    sort.descending = active ? !sort.descending : firstDescending;
    sort.key = key;
    redraw();
  };
  return element(
    "th",
    { scope: "col", "aria-sort": active ? (sort.descending ? "descending" : "ascending") : null, "data-key": key },
    element("button", { type: "button", onclick: click }, label),
  );
}

const dot = (name) => element("span", { class: "dot", style: `background:${colours[name]}` });

// Scores and costs

function drawScores() {
  const values = {
    name: (method) => method.name,
    ...Object.fromEntries(metrics.map(({ key }) => [key, (method) => summaryOf(method).metrics?.[key] ?? null])),
    ...Object.fromEntries(costs.map(({ key }) => [key, (method) => costOf(method, key)])),
  };
  const bestOf = (methods, { key, higher }) => {
    const found = methods.filter((method) => !summaryOf(method).num_failed).map(values[key]);
    return found.length ? (higher ? Math.max(...found) : Math.min(...found)) : null;
  };
  const baselines = result.methods.filter((method) => method.kind === "baseline");
  const learned = result.methods.filter((method) => method.kind !== "baseline");
  const best = Object.fromEntries(metrics.map((metric) => [metric.key, bestOf(learned, metric)]));
  const baseline = Object.fromEntries(metrics.map((metric) => [metric.key, bestOf(baselines, metric)]));
  const { key, descending } = state.scoreSort;
  const rows = key ? sorted(result.methods, values[key], descending) : result.methods;
  const head = element(
    "tr", {},
    heading("method", "name", state.scoreSort, false, drawScores),
    ...metrics.map((m) => heading(`${m.label} ${m.higher ? "↑" : "↓"}`, m.key, state.scoreSort, m.higher, drawScores)),
    ...costs.map((cost) => heading(`${cost.label}, ${cost.unit}`, cost.key, state.scoreSort, false, drawScores)),
  );
  const body = rows.map((method) => {
    const found = summaryOf(method);
    const failed = found.num_failed
      ? element("span", { class: "failed" }, `failed on ${found.num_failed} of ${found.num_failed + found.num_done}`)
      : null;
    return element(
      "tr", { "data-name": method.name },
      element("td", {}, dot(method.name), element("span", { class: "name" }, method.name), failed ? " " : null, failed,
        method.note ? element("span", { class: "note" }, method.note) : null),
      ...metrics.map(({ key, digits, higher }) => {
        const value = values[key](method);
        if (value === null) return element("td", {}, "–");
        const mean = value.toFixed(digits);
        const spread = element("span", { class: "spread" }, ` ± ${found.metrics[`${key}_std`].toFixed(digits)}`);
        const isBaseline = method.kind === "baseline";
        const loses = !isBaseline && baseline[key] !== null && (higher ? value < baseline[key] : value > baseline[key]);
        const marks = [!isBaseline && value === best[key] ? "best" : "", loses ? "loses" : ""].join(" ").trim();
        return element("td", { "data-value": value },
          element("span", { class: marks || null, title: loses ? "worse than a baseline" : null }, mean), spread);
      }),
      ...costs.map(({ key }) => element("td", {}, threeDigits(values[key](method)) || "–")),
    );
  });
  find("scores").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
  const failures = result.records.filter((r) => r.status === "failed" && r.context_views === state.count);
  find("failures").replaceChildren(
    ...failures.map((record) =>
      element("details", {}, element("summary", {}, `${record.method} failed on ${record.scene}`),
        element("pre", {}, record.error))),
  );
}

// Look closely

function options(select, names, chosen, change) {
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  select.value = chosen;
  select.onchange = () => change(select.value);
}

function drawLook() {
  const scene = sceneByName[state.scene];
  const position = state.target[scene.name];
  const frame = scene.targets[position];
  const available = [TRUTH, ...result.methods.map((m) => m.name).filter((name) => isDone(name, scene.name))];
  for (const side of ["left", "right"]) if (!available.includes(state[side])) state[side] = TRUTH;
  options(find("scene"), result.scenes.map((s) => s.name), scene.name, (name) => { state.scene = name; drawLook(); });
  options(find("left"), available, state.left, (name) => { state.left = name; drawLook(); });
  options(find("right"), available, state.right, (name) => { state.right = name; drawLook(); });
  find("which").textContent = `target ${position + 1} / ${scene.targets.length}`;
  for (const [image, side] of [["under", "left"], ["over", "right"]]) {
    find(image).src = shown(state[side], scene.name, frame);
    find(image).alt = `${state[side]}, ${scene.name}, frame ${frame}`;
    find(`${side}-name`).textContent = state[side];
  }
  find("context").replaceChildren(
    ...scene.context.slice(0, state.count).map((context, i) =>
      element("img", { src: photo(scene.name, "context", context), alt: `context view ${i + 1}`, title: scene.context_names[i] })),
  );
  const rows = result.methods.map(({ name }) =>
    element("tr", {}, element("td", {}, dot(name), name),
      ...(isDone(name, scene.name)
        ? metrics.map(({ key, digits }) => element("td", {}, perImage(name, scene.name, key).toFixed(digits)))
        : [element("td", { colspan: metrics.length }, element("span", { class: "failed" }, "failed"))])));
  const head = element("tr", {}, element("th", {}, ""), ...metrics.map((m) => element("th", {}, m.label)));
  find("target-scores").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function step(scene, by) {
  const number = sceneByName[scene].targets.length;
  state.target[scene] = (state.target[scene] + by + number) % number;
}

// Scene by scene

function drawScenes() {
  const metric = metricOf(state.metric);
  const { key, descending } = state.sceneSort;
  const value = key === "name" ? (scene) => scene.name : (scene) => scoreOf(key, scene.name, state.metric);
  const order = key ? sorted(result.scenes, value, descending) : result.scenes;
  const head = element(
    "tr", {},
    heading("scene, context", "name", state.sceneSort, false, drawScenes),
    element("th", {}, TRUTH),
    ...result.methods.map(({ name }) => heading(name, name, state.sceneSort, metric.higher, drawScenes)),
  );
  const rows = order.map((scene) => sceneRow(scene, metric));
  find("scenes").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function sceneRow(scene, metric) {
  const position = state.target[scene.name];
  const frame = scene.targets[position];
  const move = (by) => () => {
    step(scene.name, by);
    row.replaceWith(sceneRow(scene, metric));
    if (scene.name === state.scene) drawLook();
  };
  const look = (name) => () => {
    Object.assign(state, { scene: scene.name, right: name, left: name === TRUTH ? state.left : TRUTH });
    drawLook();
    find("look").scrollIntoView({ behavior: "smooth" });
  };
  const open = (name, ...images) => element("button", { type: "button", class: "picture", onclick: look(name) }, ...images);
  const image = (src, alt) => element("img", { src, alt, loading: "lazy", width: result.image_size[1], height: result.image_size[0], style: "height:auto" });
  const cells = result.methods.map(({ name }) => {
    if (!isDone(name, scene.name)) return element("td", {}, element("span", { class: "failed" }, "failed"));
    const mean = scoreOf(name, scene.name, metric.key);
    const images = [image(picture(name, scene.name, "target", frame), `${name}, ${scene.name}`)];
    if (find("errors").checked) images.push(image(picture(name, scene.name, "errors", frame), `errors of ${name}`));
    return element("td", { "data-value": mean }, open(name, ...images),
      element("span", { title: "mean over the scene's targets" }, mean.toFixed(metric.digits)),
      element("span", { class: "spread", title: "of this picture" }, ` (${perImage(name, scene.name, metric.key).toFixed(metric.digits)})`));
  });
  const strip = scene.context.slice(0, state.count).map((context) =>
    image(photo(scene.name, "context", context), `context of ${scene.name}`));
  const stepper = element("div", { class: "stepper mini" },
    element("button", { type: "button", onclick: move(-1), "aria-label": "previous target" }, "‹"),
    element("span", {}, `${position + 1} / ${scene.targets.length}`),
    element("button", { type: "button", onclick: move(1), "aria-label": "next target" }, "›"));
  const row = element("tr", { "data-scene": scene.name },
    element("td", {}, element("span", { class: "name" }, scene.name), element("div", { class: "strip" }, ...strip)),
    element("td", {}, open(TRUTH, image(photo(scene.name, "target", frame), `ground truth, ${scene.name}`)), stepper),
    ...cells);
  return row;
}

// Once

function drawCounts() {
  find("counts").replaceChildren(...result.context_views.map((count) =>
    element("button", {
      type: "button", "aria-pressed": count === state.count,
      onclick: () => { state.count = count; draw(); },
    }, `${count} context views`)));
}

function draw() {
  drawCounts();
  drawScores();
  drawLook();
  drawScenes();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  find("theme").textContent = theme === "dark" ? "☀ light" : "☾ dark";
}

function drawOnce() {
  const targets = result.scenes.reduce((sum, scene) => sum + scene.targets.length, 0);
  const [height, width] = result.image_size;
  document.title = find("title").textContent = result.title;
  const scenes = result.scenes.length === 1 ? "1 scene" : `${result.scenes.length} scenes`;
  find("about").textContent = `${scenes} · ${targets} target images · ${width} × ${height} pixels · ${result.machine.device}, ${result.machine.threads} threads · ${result.made.slice(0, 10)}`;
  if (Math.max(height, width) <= 160) document.body.classList.add("pixels");
  const side = Math.min(168, Math.max(96, Math.floor(1150 / (result.methods.length + 1)) - 16));
  find("scenes").style.setProperty("--side", `${side}px`);
  find("wipe").style.aspectRatio = `${width} / ${height}`;
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  find("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

  const move = (by) => () => { step(state.scene, by); drawLook(); drawScenes(); };
  find("previous").onclick = move(-1);
  find("next").onclick = move(1);
  find("swap").onclick = () => { [state.left, state.right] = [state.right, state.left]; drawLook(); };
  find("slider").oninput = () => find("wipe").style.setProperty("--at", `${find("slider").value}%`);
  find("metric").replaceChildren(...metrics.map(({ key, label }) => element("option", { value: key }, label)));
  find("metric").onchange = () => { state.metric = find("metric").value; drawScenes(); };
  find("errors").onchange = drawScenes;

  const captions = { quality_views: "Against the number of context views; targets are the same.", quality_time: "Against the time from photos to the first picture, a point for each number of context views, which is beside it." };
  find("plots").append(element("div", { class: "wide" }, ...result.plots.map((kind) =>
    element("figure", {},
      ...["light", "dark"].map((theme) => element("img", { class: `plot ${theme}`, src: `${kind}_${theme}.png`, alt: captions[kind] })),
      element("figcaption", {}, captions[kind])))));
  find("videos").hidden = result.videos.length === 0;
  find("videos").append(element("div", { class: "wide" }, ...result.videos.map((video) =>
    element("figure", {},
      element("video", { src: path(video.file), controls: "", loop: "", muted: "", preload: "metadata" }),
      element("figcaption", {}, `${video.scene}, ${video.context_views} context views. The path is slowest where a photo was taken.`)))));

  const versions = Object.entries(result.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  const rows = {
    Command: element("code", {}, result.command),
    Data: `${result.data}, background ${result.background}`,
    Machine: `${result.machine.processor}, ${result.machine.cores} cores, ${result.machine.threads} threads, ${result.machine.device}`,
    "Ran beside": result.beside,
    Code: `${result.code.version} (${result.code.commit ?? "not a checkout"})`,
    Versions: versions,
    Made: result.made,
  };
  find("made").replaceChildren(...Object.entries(rows).flatMap(([label, value]) => [element("dt", {}, label), element("dd", {}, value)]));
  find("notes").replaceChildren(...result.notes.map((note) => element("li", {}, note)));
}

const learned = result.methods.filter((method) => method.kind !== "baseline");
const score = (method) => summaryOf(method).metrics?.[metrics[0].key] ?? null;
state.right = sorted(learned.length ? learned : result.methods, score, metrics[0].higher)[0].name;
drawOnce();
draw();
