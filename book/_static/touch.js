// Pictures that a reader can touch: the directive {touch} writes a box with a still picture and, as JSON, the numbers of
// book/touch.py.  Where scripts run, the picture gives way to controls.  No library, no network; every control is a
// native one, so the keyboard works, and a line of words says what the picture shows.
(() => {
  // ------------------------------------------------------------------------------------------------ the mathematics

  // Python's round: to the nearest whole number, halves to the even one.
  const round = (x) => {
    const low = Math.floor(x);
    return x - low === 0.5 ? low + Math.abs(low % 2) : Math.round(x);
  };
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

  // The ranks of one layer under alr.control.Bidirectional (script v10) that is asked for these targets, the start in front.
  const follow = (control, targets, rank, cap) => {
    const path = [rank];
    let smooth = rank;
    for (const target of targets) {
      const wanted = clamp(control.safety * target, control.min_rank, cap);
      smooth = control.ema * smooth + (1 - control.ema) * wanted;
      let r = path[path.length - 1];
      if (Math.abs(smooth - r) >= control.threshold) {
        r = clamp(r + clamp(round(smooth - r), -control.max_step, control.max_step), control.min_rank, cap);
      }
      path.push(r);
    }
    return path;
  };

  // What rank r of an m x n layer costs against the dense one (book/touch.py, costs).
  const costs = (m, n, r) => {
    const share = (r * (m + n)) / (m * n);
    return { parameters: r * (m + n), flops: 2 * r * (m + n), share, break_even: (m * n) / (m + n),
             rows: m * Math.sqrt(share), columns: n * Math.sqrt(share) };
  };

  // The relative error of the best matrix of rank r in the Frobenius norm: what the smaller singular values hold.
  const error = (values, r) => {
    const energy = (part) => part.reduce((sum, s) => sum + s * s, 0);
    return Math.sqrt(energy(values.slice(r)) / energy(values));
  };

  globalThis.alrTouch = { round, follow, costs, error };
  if (typeof document === "undefined") return;

  // ------------------------------------------------------------------------------------------------ small tools

  const SVG = "http://www.w3.org/2000/svg";
  const BLUE = "#0072B2", VERMILION = "#D55E00", GREY = "#8a8a8a", INK = "#222222";
  let number = 0;

  const make = (name, attributes = {}, ...content) => {
    const drawn = ["svg", "g", "rect", "line", "path", "circle", "text", "title"].includes(name);
    const element = drawn ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...content);
    return element;
  };

  // A slider with its name and its value beside it; changed(value) is called after every move, and by `moved`.
  const slider = (box, name, { min, max, step = 1, value, says = String }, changed) => {
    const id = `alr-slider-${++number}`;
    const input = make("input", { type: "range", id, min, max, step, value });
    const shown = make("output", { for: id });
    const moved = () => {
      shown.textContent = says(Number(input.value));
      input.setAttribute("aria-valuetext", says(Number(input.value)));
      changed(Number(input.value));
    };
    input.addEventListener("input", moved);
    box.append(make("div", { class: "alr-slider" }, make("label", { for: id }, name), input, shown));
    return { input, moved, set: (to) => { input.value = to; moved(); } };
  };

  const picture = () => make("svg", { class: "alr-picture", role: "img" });

  // A phone's pictures are half as wide, with their parts below each other, so that letters stay large: `draw` asks
  // narrow.matches for its layout, gives the picture its size, and is called again when the answer changes.
  const narrow = matchMedia("(max-width: 600px)");
  const size = (svg, width, height) => svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const said = () => make("p", { class: "alr-said", role: "status" });
  const words = (x, digits = 3) => x.toLocaleString("en", { maximumSignificantDigits: digits });

  // A linear scale, and a line through points [x, y] in data.
  const scale = (low, high, from, to) => (x) => from + ((x - low) / (high - low || 1)) * (to - from);
  const line = (points, x, y, colour, more = {}) => make("path", {
    d: points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(""),
    fill: "none", stroke: colour, "stroke-width": 2, ...more });
  const stairs = (values) => values.flatMap((v, i) => (i ? [[i, values[i - 1]], [i, v]] : [[0, v]]));
  const text = (x, y, content, more = {}) => make("text", { x, y, "font-size": 13, fill: INK, ...more }, content);

  // Axes with a few ticks; those of y carry lines.  Without a name, x has no ticks.
  const axes = (svg, x, y, xs, ys, xName, yName, top = 18) => {
    const [left, right, bottom] = [x(xs[0]), x(xs[xs.length - 1]), y(ys[0])];
    for (const v of ys) {
      svg.append(make("line", { x1: left, x2: right, y1: y(v), y2: y(v), stroke: "#e0e0e0" }),
                 text(left - 6, y(v) + 4, words(v), { "text-anchor": "end" }));
    }
    for (const v of xName ? xs : []) svg.append(text(x(v), bottom + 18, words(v), { "text-anchor": "middle" }));
    svg.append(make("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "#555" }),
               text(right, bottom + 36, xName, { "text-anchor": "end" }), text(left, top, yName));
  };
  const ticks = (high, n) => {
    const rough = high / n, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough);
    return Array.from({ length: Math.ceil(high / step - 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(12)));
  };

  // ------------------------------------------------------------------------------------------------ ranks over training

  const ranks = (box, data) => {
    const arms = Object.keys(data.runs);
    const id = `alr-run-${++number}`;
    const choose = make("select", { id }, ...arms.map((arm) => make("option", { value: arm }, arm)));
    const play = make("button", { type: "button", class: "alr-button" }, "Play");
    const [svg, words_] = [picture(), said()];
    box.append(make("div", { class: "alr-controls" }, make("label", { for: id }, "run"), choose, play));
    let timer = null, at;
    const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };

    const draw = (i) => {
      const run = data.runs[choose.value];
      const top = Math.max(...data.layers.map((_, k) => Math.max(...run.ranks.map((row) => row[k]))));
      const losses = run.loss.filter((v) => v !== null);
      const [low, high] = [Math.min(...losses), Math.max(...losses)];
      // right: the end of the bars; the loss goes from `from` to `to`, and from `peak` down to `deep`
      const at_ = narrow.matches ? { right: 350, from: 48, to: 340, peak: 370, deep: 500, keys: 3, step: 106 }
                                 : { right: 470, from: 530, to: 700, peak: 30, deep: 270, keys: 6, step: 70 };
      size(svg, ...(narrow.matches ? [360, 545] : [720, 330]));
      const y = scale(0, top, 270, 30), wide = (at_.right - 40) / data.layers.length;
      svg.replaceChildren();
      axes(svg, (v) => 40 + v * (at_.right - 40), y, [0, 1], ticks(top, 4).filter((v) => v <= top), "", "rank of each layer");
      let block = null;
      data.layers.forEach((layer, k) => {
        const parts = layer.split("."), role = parts[parts.length - 1], r = run.ranks[i][k];
        svg.append(make("rect", { x: 41 + k * wide, y: y(r), width: wide - 2, height: 270 - y(r), fill: data.colours[role] },
                        make("title", {}, `${layer}: rank ${r}`)));
        if (parts[1] !== block) svg.append(text(41 + k * wide, 288, `block ${(block = parts[1])}`));
      });
      const roles = [...new Set(data.layers.map((layer) => layer.split(".").pop()))];            // in the order of a block
      roles.forEach((role, k) => svg.append(
        make("rect", { x: 40 + (k % at_.keys) * at_.step, y: 300 + 20 * Math.floor(k / at_.keys), width: 12, height: 12,
                       fill: data.colours[role] }),
        text(57 + (k % at_.keys) * at_.step, 311 + 20 * Math.floor(k / at_.keys), role)));
      const x = scale(0, data.epochs.length - 1, at_.from, at_.to), v = scale(low, high, at_.deep, at_.peak);
      axes(svg, x, v, [0, data.epochs.length - 1], [low, high], "epoch", "validation loss (nats)", at_.peak - 12);
      const points = run.loss.map((loss, k) => [k, loss]).filter(([, loss]) => loss !== null);
      svg.append(line(points, x, v, GREY, { "stroke-width": 1 }), line(points.filter(([k]) => k <= i), x, v, INK));
      if (run.loss[i] !== null) svg.append(make("circle", { cx: x(i), cy: v(run.loss[i]), r: 5, fill: INK }));
      const mean = run.ranks[i].reduce((a, b) => a + b, 0) / data.layers.length;
      const loss = run.loss[i] === null ? "not trained yet" : `validation loss ${run.loss[i].toFixed(3)} nats per token`;
      words_.textContent = `${choose.value}, ${data.epochs[i] ? `epoch ${data.epochs[i]}` : "before training"}: `
        + `mean rank ${mean.toFixed(1)}, from ${Math.min(...run.ranks[i])} to ${Math.max(...run.ranks[i])}; ${loss}.`;
      svg.setAttribute("aria-label", words_.textContent);
      at = i;
    };
    const epoch = slider(box, "epoch", { min: 0, max: data.epochs.length - 1, value: 0,
                                         says: (i) => (data.epochs[i] ? `${data.epochs[i]}` : "start") }, draw);
    play.addEventListener("click", () => {
      if (timer !== null) return stop();
      if (at === data.epochs.length - 1) epoch.set(0);
      play.textContent = "Pause";
      timer = setInterval(() => { epoch.set(at + 1); if (at === data.epochs.length - 1) stop(); }, 400);
    });
    choose.addEventListener("change", () => draw(at));
    narrow.addEventListener("change", () => draw(at));
    box.append(svg, words_);
    epoch.moved();
  };

  // ------------------------------------------------------------------------------------------------ one layer's spectrum

  const spectrum = (box, data) => {
    const [m, n, full] = [data.rows, data.columns, data.trained.length];
    const [svg, words_] = [picture(), said()];
    const high = Math.max(...data.trained, ...data.start);
    const draw = (r) => {
      // right: the end of the curves; left, top: the corner of the three shapes; beside: where the second one starts
      const at = narrow.matches ? { right: 345, left: 50, top: 368, beside: 190 } : { right: 420, left: 460, top: 30, beside: 585 };
      const cost = costs(m, n, r), x = scale(1, full, 50, at.right), y = scale(0, high, 270, 30);
      size(svg, ...(narrow.matches ? [360, 655] : [720, 330]));
      svg.replaceChildren();
      axes(svg, x, y, [1, Math.round(full / 2), full], ticks(high, 4).filter((v) => v <= high), "singular value (index)", "singular value");
      svg.append(make("rect", { x: 50, y: 30, width: x(r) - 50, height: 240, fill: BLUE, opacity: 0.12 }),
                 line(data.start.map((s, i) => [i + 1, s]), x, y, GREY), line(data.trained.map((s, i) => [i + 1, s]), x, y, BLUE),
                 make("line", { x1: x(cost.break_even), x2: x(cost.break_even), y1: 30, y2: 270, stroke: VERMILION, "stroke-dasharray": "3 3" }),
                 text(x(cost.break_even) - 6, 44, "break-even", { "text-anchor": "end", fill: "#c25600" }),
                 text(50, 326, "blue: trained; grey: at the start"));
      // the three ways to hold the layer, drawn to one scale: an area is a number of parameters
      const unit = 120 / m, shape = (left, top, rows, columns, colour) => make("rect", {
        x: left, y: top, width: Math.max(columns * unit, 1), height: Math.max(rows * unit, 1), fill: colour, opacity: 0.75 });
      const { left, top, beside } = at;
      svg.append(text(left, top - 8, `dense, ${m} x ${n}`), shape(left, top, m, n, INK),
                 text(beside, top - 8, `U V, rank ${r}`), shape(beside, top, m, r, BLUE), shape(beside + 5 + r * unit, top, r, n, BLUE),
                 text(left, top + 152, `dense of the same size, ${Math.round(cost.rows)} x ${Math.round(cost.columns)}`),
                 shape(left, top + 160, cost.rows, cost.columns, VERMILION));
      const side = cost.share <= 1 ? `${Math.round(cost.rows)} x ${Math.round(cost.columns)}` : "a larger one";
      words_.textContent = `Rank ${r}: relative error ${words(error(data.trained, r))} after training, `
        + `${words(error(data.start, r))} before; ${cost.parameters.toLocaleString("en")} parameters and `
        + `${cost.flops.toLocaleString("en")} FLOPs per token, ${Math.round(100 * cost.share)} % of dense. `
        + `Break-even is at rank ${words(cost.break_even, 4)}. For as many parameters one gets a dense layer of ${side}.`;
      svg.setAttribute("aria-label", words_.textContent);
    };
    const rank = slider(box, "rank", { min: 1, max: full, value: Math.round(full / 4) }, draw);
    narrow.addEventListener("change", rank.moved);
    box.append(svg, words_);
    rank.moved();
  };

  // ------------------------------------------------------------------------------------------------ a controller

  const controller = (box, data) => {
    const [svg, words_] = [picture(), said()];
    const set = { ...data.control }, start = data.ranks[0];
    let first = start;
    const draw = () => {
      const path = follow(set, data.targets, first, data.cap);
      const wanted = data.targets.map((t) => clamp(set.safety * t, set.min_rank, data.cap));
      const high = Math.max(...path, ...wanted, ...data.ranks);
      const x = scale(0, path.length - 1, 50, narrow.matches ? 345 : 700), y = scale(0, high, 270, 30);
      size(svg, narrow.matches ? 360 : 720, narrow.matches ? 370 : 325);
      svg.replaceChildren();
      axes(svg, x, y, [0, Math.round((path.length - 1) / 2), path.length - 1], ticks(high, 4).filter((v) => v <= high), "decision", "rank");
      svg.append(line(wanted.map((w, i) => [i + 1, w]), x, y, GREY, { "stroke-dasharray": "4 3" }),
                 line(stairs(data.ranks), x, y, INK, { "stroke-width": 5 }), line(stairs(path), x, y, VERMILION),
                 ...["vermilion: your controller;", "black: as recorded;", "dashed: safety x stable rank"].map((key, i) => narrow.matches
                   ? text(50, 326 + 18 * i, key) : text([50, 222, 350][i], 318, key)));
      const last = path[path.length - 1], moves = path.filter((r, i) => i && r !== path[i - 1]).length;
      words_.textContent = `The rank ends at ${last} (recorded: ${data.ranks[data.ranks.length - 1]}) after ${moves} moves in `
        + `${data.targets.length} decisions; the last wish is ${words(wanted[wanted.length - 1])}.`;
      svg.setAttribute("aria-label", words_.textContent);
    };
    const hold = (name, key, range) => slider(box, name, { ...range, value: set[key] }, (v) => { set[key] = v; draw(); });
    hold("safety", "safety", { min: 0.5, max: 4, step: 0.1 });
    hold("average (ema)", "ema", { min: 0, max: 0.95, step: 0.05 });
    hold("dead band", "threshold", { min: 0, max: 10, step: 0.5 });
    hold("largest step", "max_step", { min: 1, max: 32 });
    slider(box, "first rank", { min: set.min_rank, max: data.cap, value: start }, (v) => { first = v; draw(); });
    box.querySelectorAll("input").forEach((input) => input.dispatchEvent(new Event("input")));
    narrow.addEventListener("change", draw);
    box.append(svg, words_);
  };

  // ------------------------------------------------------------------------------------------------ claims by verdict and chapter

  const claims = (table) => {
    const rows = [...table.tBodies[0].rows], groups = [];
    for (const row of rows) {
      if (row.classList.contains("alr-chapter")) groups.push({ head: row, name: row.textContent.trim(), rows: [] });
      else if (groups.length) groups[groups.length - 1].rows.push(row);
    }
    const verdict = (row) => row.querySelector(".alr-verdict")?.textContent.trim() ?? "";
    const select = (name, options) => {
      const id = `alr-filter-${++number}`;
      const element = make("select", { id }, make("option", { value: "" }, "all"), ...options.map((o) => make("option", { value: o }, o)));
      element.addEventListener("change", show);
      controls.append(make("label", { for: id }, name), element);
      return element;
    };
    const controls = make("div", { class: "alr-controls alr-filter" }), words_ = said();
    const show = () => {
      let seen = 0;
      for (const group of groups) {
        const mine = group.rows.filter((row) => (!byVerdict.value || verdict(row) === byVerdict.value)
                                             && (!byChapter.value || group.name === byChapter.value));
        group.rows.forEach((row) => { row.hidden = !mine.includes(row); });
        group.head.hidden = !mine.length;
        seen += mine.length;
      }
      words_.textContent = `${seen} of ${groups.reduce((sum, g) => sum + g.rows.length, 0)} rows`;
    };
    const found = [...new Set(groups.flatMap((g) => g.rows.map(verdict)))].filter(Boolean);
    const byVerdict = select("verdict", found), byChapter = select("chapter", groups.map((g) => g.name));
    controls.append(words_);
    (table.closest(".alr-html") ?? table).before(controls);
    // a link to a row that is filtered away shows it
    addEventListener("hashchange", () => {
      const row = document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest("tr");
      if (row?.hidden) { byVerdict.value = byChapter.value = ""; show(); row.scrollIntoView(); }
    });
    show();
  };

  // ------------------------------------------------------------------------------------------------ leaderboard: rows and points

  const board = (table) => {
    const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent.trim());
    const [lossAt, sizeAt] = [heads.findIndex((h) => h.startsWith("loss")), heads.findIndex((h) => h.startsWith("blocks"))];
    if (lossAt < 0 || sizeAt < 0) return;
    const looks = JSON.parse(document.getElementById("alr-looks")?.textContent ?? "{}");
    const colour = (arm) => looks[arm] ?? looks[Object.keys(looks).filter((k) => arm.startsWith(`${k}, `) || arm.startsWith(`${k} `))
      .sort((a, b) => b.length - a.length)[0]] ?? INK;
    const all = [...table.tBodies[0].rows].map((row) => ({
      row, arm: row.cells[0].dataset.sort ?? row.cells[0].textContent.trim(),
      loss: Number(row.cells[lossAt].dataset.sort || NaN), size: Number(row.cells[sizeAt].dataset.sort || NaN) / 1000 }))
      .filter((p) => Number.isFinite(p.loss) && p.size > 0);
    if (all.length < 2) return;
    const svg = picture(), keys = make("div", { class: "alr-keys", role: "group", "aria-label": "arms shown in the picture" });
    const sizes = all.map((p) => Math.log(p.size)), losses = all.map((p) => p.loss);
    const span = (values) => [Math.min(...values), Math.max(...values)];
    let x, y;                                           // set by draw, read by light
    const name = text(0, 0, "", { "font-weight": 600 });
    const light = (point, on) => {
      point.row.classList.toggle("alr-lit", on);
      point.key.classList.toggle("alr-lit", on);
      point.dot.setAttribute("r", on ? 10 : 6);
      name.textContent = on ? point.arm : "";
      const right = x(Math.log(point.size)) > (narrow.matches ? 200 : 500);
      name.setAttribute("x", x(Math.log(point.size)) + (right ? -14 : 14));
      name.setAttribute("y", y(point.loss) - 12);
      name.setAttribute("text-anchor", right ? "end" : "start");
    };
    for (const point of all) {
      point.dot = make("circle", { r: 6, fill: colour(point.arm), stroke: "#fff" },
                       make("title", {}, `${point.arm}: ${point.loss.toFixed(3)} nats, ${words(point.size)} thousand parameters`));
      point.key = make("button", { type: "button", "aria-pressed": "true" },
                       make("span", { style: `background:${colour(point.arm)}` }), point.arm);
      point.key.addEventListener("click", () => {
        const off = point.key.getAttribute("aria-pressed") === "true";
        point.key.setAttribute("aria-pressed", String(!off));
        point.dot.style.display = off ? "none" : "";
      });
      for (const target of [point.row, point.dot, point.key]) {
        for (const [event, on] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]]) {
          target.addEventListener(event, () => light(point, on));
        }
      }
      point.dot.addEventListener("click", () => point.row.scrollIntoView({ block: "center" }));
      keys.append(point.key);
    }
    const draw = () => {
      x = scale(...span(sizes), 60, narrow.matches ? 340 : 690);
      y = scale(...span(losses), 280, 40);
      size(svg, narrow.matches ? 360 : 720, 340);
      svg.replaceChildren();
      axes(svg, (v) => x(Math.log(v)), y, span(all.map((p) => p.size)), span(losses),
           "parameters in the blocks (thousands, logarithmic)", "validation loss (nats per token)");
      for (const point of all) {
        point.dot.setAttribute("cx", x(Math.log(point.size)));
        point.dot.setAttribute("cy", y(point.loss));
        svg.append(point.dot);
      }
      svg.append(name);
    };
    narrow.addEventListener("change", draw);
    draw();
    svg.setAttribute("aria-label", `Loss against size of ${all.length} arms; the table holds the same numbers.`);
    const figure = make("div", { class: "alr-touch alr-board" }, svg, keys);
    (table.closest(".alr-html") ?? table).before(figure);
  };

  // ------------------------------------------------------------------------------------------------ start

  document.addEventListener("DOMContentLoaded", () => {
    const kinds = { ranks, spectrum, controller };
    document.querySelectorAll(".alr-touch script[data-kind]").forEach((script) => {
      const box = script.closest(".alr-touch");
      const mount = make("div", { class: "alr-mount" });
      box.append(mount);
      kinds[script.dataset.kind](mount, JSON.parse(script.textContent));
      box.classList.add("alr-alive");
    });
    document.querySelectorAll("table.alr-claims").forEach(claims);
    document.querySelectorAll("table.alr-sortable").forEach(board);
  });
})();
