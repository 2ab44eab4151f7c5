// Controls, chart and table of the explorer. Numbers are what counts; a slider beside each sets its number.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const form = document.getElementById("controls");
  // key, label, least, most, logarithmic, whole
  const GROUPS = [
    ["Demand", [["volume", "Tokens a month", 1e5, 1e12, true], ["input_parts", "Input parts", 0, 20, false], ["output_parts", "Output parts", 0, 20, false]]],
    ["Self-hosted", [["option"], ["usd_per_gpu_hour", "USD per GPU-hour", 0.1, 20, true], ["tokens_per_s", "Tokens/s of a replica, at the page's own ratio", 10, 100000, true],
      ["max_utilisation_ratio", "Utilisation at the peak (0–1)", 0.01, 1, false], ["peak_to_mean", "Peak / mean load", 1, 10, false], ["min_replicas", "Least replicas", 1, 8, false, true]]],
    ["API", [["api"], ["input_per_million", "USD per million in", 0.01, 100, true], ["output_per_million", "USD per million out", 0.01, 100, true]]],
  ];
  const RULES = { volume: (v) => v > 0, input_parts: (v) => v >= 0, output_parts: (v) => v >= 0, usd_per_gpu_hour: (v) => v >= 0, tokens_per_s: (v) => v > 0,
    max_utilisation_ratio: (v) => v > 0 && v <= 1, peak_to_mean: (v) => v >= 1, min_replicas: (v) => v >= 1 && Number.isInteger(v),
    input_per_million: (v) => v >= 0, output_per_million: (v) => v >= 0 };
  const fields = {};
  let state = EXPLORER.start(data);

  const make = (tag, attributes = {}, text = "") => {
    const e = document.createElement(tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    e.textContent = text;
    return e;
  };
  const toSlider = (f, v) => (f.log ? Math.log10(Math.max(v, f.least / 10)) : v);
  const fromSlider = (f, s) => {
    const v = f.log ? 10 ** s : Number(s);
    return f.whole ? Math.round(v) : Number(v.toPrecision(3));
  };

  for (const [title, items] of GROUPS) {
    const set = make("fieldset");
    set.append(make("legend", {}, title));
    for (const [key, label, least, most, log, whole] of items) {
      if (key === "option" || key === "api") {
        const row = make("label", { class: "wide" });
        const select = make("select", { id: `c-${key}`, "aria-label": key === "api" ? "API" : "self-hosted option" });
        data[key === "api" ? "apis" : "options"].forEach((o, i) => select.append(make("option", { value: i }, o.name)));
        select.addEventListener("input", () => {
          const fresh = EXPLORER.start(data, key === "option" ? Number(select.value) : state.option, key === "api" ? Number(select.value) : state.api);
          const own = key === "option" ? ["option", "usd_per_gpu_hour", "tokens_per_s", "max_utilisation_ratio", "peak_to_mean", "min_replicas"] : ["api", "input_per_million", "output_per_million"];
          for (const k of own) state[k] = fresh[k];
          show(true);
        });
        row.append(select);
        set.append(row);
        fields[key] = { select };
        continue;
      }
      const f = { least, most, log, whole };
      const row = make("label");
      f.number = make("input", { id: `c-${key}`, type: "number", step: "any", min: key === "volume" || key === "tokens_per_s" ? 0 : least === 0 ? 0 : undefined });
      f.slider = make("input", { id: `s-${key}`, type: "range", step: "any", min: log ? Math.log10(least) : least, max: log ? Math.log10(most) : most, "aria-label": label });
      if (whole) f.slider.step = 1;
      f.number.removeAttribute("min");
      f.number.addEventListener("input", () => set_value(key, f.number.value === "" ? NaN : Number(f.number.value), false));
      f.slider.addEventListener("input", () => set_value(key, fromSlider(f, Number(f.slider.value)), true));
      row.append(make("span", {}, label), f.number, f.slider);
      set.append(row);
      fields[key] = f;
    }
    form.append(set);
  }
  form.addEventListener("submit", (e) => e.preventDefault());

  function set_value(key, value, from_slider) {
    const other = key === "input_parts" ? state.output_parts : key === "output_parts" ? state.input_parts : 1;
    const good = Number.isFinite(value) && RULES[key](value) && !(value === 0 && other === 0);
    fields[key].number.setAttribute("aria-invalid", String(!good));
    if (!good) return;
    state[key] = value;
    if (from_slider) fields[key].number.value = String(value);
    else fields[key].slider.value = toSlider(fields[key], value);
    show(false);
  }

  function show(all) {
    if (all)
      for (const [key, f] of Object.entries(fields)) {
        if (f.select) { f.select.value = state[key]; continue; }
        f.number.value = String(state[key]);
        f.slider.value = toSlider(f, state[key]);
        f.number.setAttribute("aria-invalid", "false");
      }
    const r = EXPLORER.explore(data, state);
    document.getElementById("explorer-answer").textContent = r.answer;
    document.getElementById("explorer-pair").textContent = pair(r);
    table(r);
    document.getElementById("explorer-chart").replaceChildren(chart(r));
    document.documentElement.dataset.explored = JSON.stringify({ monthly_usd: r.monthly_usd, first: r.first_tokens });
  }

  function pair(r) {
    const o = r.options[state.option], a = r.apis[state.api];
    if (r.first_tokens === null) return `${o.name} never beats ${a.name}: even as full as it may get, a GPU costs more per token than the API.`;
    if (r.first_tokens === 0) return `${o.name} beats ${a.name} at any volume.`;
    let text = `${o.name} beats ${a.name} from ${EXPLORER.volumeText(r.first_tokens)} tokens a month on`;
    if (r.low_tokens !== null) text += ` (${EXPLORER.volumeText(r.low_tokens)} – ${r.high_tokens === null ? "never" : EXPLORER.volumeText(r.high_tokens)})`;
    return text + ".";
  }

  function table(r) {
    const names = [...r.options, ...r.apis].map((x) => x.name);
    const least = Math.min(...r.monthly_usd);
    const rows = names.map((name, i) => {
      const tr = make("tr"), own = i < r.options.length;
      if (r.monthly_usd[i] === least) tr.classList.add("best");
      if (i === state.option || i - r.options.length === state.api) tr.classList.add("chosen");
      const clock = own && r.options[i].billing === "around_clock";
      const used = own ? `${(100 * r.utilisation[i]).toFixed(r.utilisation[i] < 0.1 ? 1 : 0)}%` : "";
      for (const [text, cls] of [[name, ""], [EXPLORER.usdText(r.monthly_usd[i]), "num"], [EXPLORER.usdText(r.monthly_usd[i] / r.volume * 1e6), "num"], [clock ? String(r.replicas[i]) : "", "num"], [used, "num"]])
        tr.append(make("td", cls ? { class: cls } : {}, text));
      return tr;
    });
    document.querySelector("#explorer-table tbody").replaceChildren(...rows);
  }

  function chart(r) {
    const W = 760, H = 430, L = 66, R = 12, T = 14, B = 46;
    const low = Math.min(data.low, r.volume / 3), high = Math.max(data.high, r.volume * 3, r.first_tokens ? Math.min(r.first_tokens * 2, 1e13) : 0);
    const curves = [];
    const volumes = (o) => {
      const out = [];
      for (let i = 0; i <= 200; i++) out.push(low * (high / low) ** (i / 200));
      if (o && o.billing === "around_clock") {
        const k = EXPLORER.capacity(o, o.tokens_per_s), first = Math.max(o.min_replicas, Math.floor(low / k));
        for (let n = first; n < first + 60; n++) for (const f of [1, 1 + 1e-9]) if (k * n * f >= low && k * n * f <= high) out.push(k * n * f);
      }
      return out.sort((a, b) => a - b);
    };
    r.options.forEach((o, i) => curves.push([o.name, volumes(o).map((v) => [v, EXPLORER.monthlyUsd(o, v)]), data.colors[i], false, i === state.option]));
    r.apis.forEach((a, i) => curves.push([a.name, [low, high].map((v) => [v, v * EXPLORER.apiUsdPerToken(a, r.mix)]), data.colors[r.options.length + i], true, i === state.api]));
    const ys = curves.flatMap(([, p]) => p.map(([, y]) => y)).filter((y) => y > 0);
    const bottom = Math.min(...ys) / 1.3, top = Math.max(...ys) * 1.3;
    const X = (v) => L + (W - L - R) * Math.log(v / low) / Math.log(high / low);
    const Y = (v) => H - B - (H - T - B) * Math.log(Math.max(v, bottom) / bottom) / Math.log(top / bottom);
    const NS = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${W} ${H + 20 * Math.ceil(curves.length / 2) + 8}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "Dollars a month against tokens a month. " + r.answer);
    const add = (tag, attributes, text) => {
      const e = document.createElementNS(NS, tag);
      for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
      if (text !== undefined) e.textContent = text;
      svg.append(e);
    };
    const decades = (a, b) => { const out = []; for (let e = Math.ceil(Math.log10(a)); e <= Math.log10(b) + 1e-9; e++) out.push(10 ** e); return out; };
    const plain = (text) => text.replace(/\.0+(?=\D|$)/, "");
    for (const v of decades(low, high)) {
      add("line", { x1: X(v), x2: X(v), y1: T, y2: H - B, stroke: "var(--grid)" });
      add("text", { x: X(v), y: H - B + 17, "text-anchor": "middle", class: "quiet" }, plain(EXPLORER.volumeText(v)));
    }
    for (const v of decades(bottom, top)) {
      add("line", { x1: L, x2: W - R, y1: Y(v), y2: Y(v), stroke: "var(--grid)" });
      add("text", { x: L - 6, y: Y(v) + 4, "text-anchor": "end", class: "quiet" }, plain(EXPLORER.usdText(v)));
    }
    add("text", { x: (L + W - R) / 2, y: H - B + 36, "text-anchor": "middle" }, "Tokens per month");
    add("text", { x: 13, y: (T + H - B) / 2, "text-anchor": "middle", transform: `rotate(-90 13 ${(T + H - B) / 2})` }, "USD per month");
    add("line", { x1: X(r.volume), x2: X(r.volume), y1: T, y2: H - B, stroke: "var(--accent)", "stroke-dasharray": "2 3", "stroke-width": 1.5 });
    add("text", { x: X(r.volume) + 5, y: T + 10, class: "quiet" }, EXPLORER.volumeText(r.volume));
    for (const [, points, color, dashed, chosen] of curves) {
      const d = points.map(([v, y], i) => `${i ? "L" : "M"}${X(v).toFixed(2)},${Y(y).toFixed(2)}`).join("");
      add("path", { d, fill: "none", stroke: `var(--series-${color % 7})`, "stroke-width": chosen ? 3.2 : 1.5, opacity: chosen ? 1 : 0.7, ...(dashed ? { "stroke-dasharray": "6 4" } : {}) });
    }
    if (r.first_tokens) {
      const y = Y(EXPLORER.monthlyUsd(r.options[state.option], r.first_tokens));
      if (r.low_tokens !== null) add("line", { x1: X(Math.max(low, r.low_tokens)), x2: X(Math.min(high, r.high_tokens === null ? high : r.high_tokens)), y1: y, y2: y, stroke: "var(--ink)", "stroke-width": 1.5 });
      add("circle", { cx: X(r.first_tokens), cy: y, r: 6, fill: "var(--surface)", stroke: "var(--ink)", "stroke-width": 2 });
    }
    curves.forEach(([name, , color, dashed, chosen], i) => {
      const x = L + (i % 2) * ((W - L) / 2), y = H + 6 + 20 * Math.floor(i / 2);
      add("line", { x1: x, x2: x + 26, y1: y, y2: y, stroke: `var(--series-${color % 7})`, "stroke-width": chosen ? 3.2 : 1.5, ...(dashed ? { "stroke-dasharray": "6 4" } : {}) });
      add("text", { x: x + 32, y: y + 4, ...(chosen ? { "font-weight": 700 } : {}) }, name);
    });
    return svg;
  }

  // A setting can be shared by the address: page.html#volume=1e9&option=3
  function from_hash() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (![...given.keys()].some((k) => k in state)) return;
    const index = (key, list) => Math.min(Math.max(0, Math.trunc(Number(given.get(key) ?? data[key]) || 0)), list.length - 1);
    state = EXPLORER.start(data, index("option", data.options), index("api", data.apis));
    for (const [key, text] of given) if (key in RULES && RULES[key](Number(text))) state[key] = Number(text);
    show(true);
  }
  document.getElementById("explorer-reset").addEventListener("click", () => { state = EXPLORER.start(data); show(true); });
  window.addEventListener("hashchange", from_hash);
  show(true);
  from_hash();
})();
