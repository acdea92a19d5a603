"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const LABELS = ["contraction", "attention", "generated kernel", "data movement", "collective", "message"];
  const COLORS = ["--contract", "--attention", "--kernel", "--routine", "--collective", "--message"];

  // Numbers for people.
  const digits = (v) => (Math.abs(v) >= 100 || v === 0 ? v.toFixed(0) : Math.abs(v) >= 10 ? v.toFixed(1) : v.toFixed(2));
  const time = (ns) => {
    const a = Math.abs(ns);
    if (a >= 1e9) return digits(ns / 1e9) + " s";
    if (a >= 1e6) return digits(ns / 1e6) + " ms";
    if (a >= 1e3) return digits(ns / 1e3) + " µs";
    return digits(ns) + " ns";
  };
  const ladder = (v, steps, unit) => {
    for (const [scale, prefix] of steps) if (v >= scale) return digits(v / scale) + " " + prefix + unit;
    return digits(v) + " " + unit;
  };
  const SI = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const size = (v) => ladder(v, [[2 ** 40, "Ti"], [2 ** 30, "Gi"], [2 ** 20, "Mi"], [2 ** 10, "Ki"]], "B");

  // The box that follows the pointer; text only, so names need no escaping.
  const showTip = (x, y, title, rows) => {
    tip.replaceChildren();
    const head = document.createElement("strong");
    head.textContent = title;
    tip.append(head);
    for (const [label, value] of rows) {
      const row = document.createElement("div");
      const left = document.createElement("span");
      const right = document.createElement("span");
      left.textContent = label;
      right.textContent = value;
      row.append(left, right);
      tip.append(row);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 16, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + 20 + box.height > innerHeight ? Math.max(8, y - box.height - 14) : y + 20) + "px";
  };
  const hideTip = () => { tip.hidden = true; };

  const canvas = document.getElementById("lanes");
  if (canvas && data.timelines.length) timelines(canvas);
  chartCursor("memory-chart", memoryAt);
  chartCursor("loss-chart", lossAt);
  contents();

  function timelines(canvas) {
    const panels = data.timelines.map((timeline) => ({
      basis: timeline.basis,
      step: timeline.step,
      lanes: timeline.lanes.map((lane) => {
        const n = lane.name.length;
        const start = new Float64Array(n), end = new Float64Array(n);
        const at = new Map();
        let clock = 0;
        for (let i = 0; i < n; i++) {
          start[i] = clock + lane.gap[i];
          end[i] = clock = start[i] + lane.duration[i];
          at.set(lane.instruction[i], i);
        }
        return { ...lane, n, start, end, at };
      }),
    }));
    const total = Math.max(1, ...panels.map((panel) => panel.step));
    const nLanes = Math.max(...panels.map((panel) => panel.lanes.length));
    const laneHeight = Math.max(7, Math.min(24, Math.floor(640 / (nLanes * panels.length))));
    const GUTTER = 74, HEAD = 30, AXIS = 26, GAP = 10;
    const panelHeight = HEAD + nLanes * laneHeight;
    const height = AXIS + panels.length * (panelHeight + GAP) + 6;
    canvas.style.height = height + "px";
    const context = canvas.getContext("2d");
    const shown = LABELS.map(() => true);
    let from = 0, span = total * 1.005, width = 0, hover = null, pointer = null, queued = false;

    const xOf = (t) => GUTTER + ((t - from) / span) * (width - GUTTER - 14);
    const tOf = (x) => from + ((x - GUTTER) / (width - GUTTER - 14)) * span;
    const topOf = (p) => AXIS + p * (panelHeight + GAP) + HEAD;
    const clamp = () => {
      span = Math.min(Math.max(span, Math.min(200, total)), total * 1.005);
      from = Math.min(Math.max(from, 0), total * 1.005 - span);
    };
    const redraw = () => {
      if (!queued) { queued = true; requestAnimationFrame(() => { queued = false; draw(); }); }
    };
    const zoom = (factor, x) => {
      const t = tOf(x);
      span *= factor;
      clamp();
      from = t - ((x - GUTTER) / (width - GUTTER - 14)) * span;
      clamp();
      redraw();
    };

    // First event that ends after t.
    const firstAfter = (lane, t) => {
      let low = 0, high = lane.n;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (lane.end[middle] <= t) low = middle + 1; else high = middle;
      }
      return low;
    };

    const hatch = (style) => {
      const tile = document.createElement("canvas");
      tile.width = tile.height = 8;
      const paint = tile.getContext("2d");
      paint.fillStyle = style.getPropertyValue("--wait-back");
      paint.fillRect(0, 0, 8, 8);
      paint.strokeStyle = style.getPropertyValue("--wait");
      paint.lineWidth = 1.6;
      paint.beginPath();
      for (const o of [-4, 4, 12]) { paint.moveTo(o - 5, 9); paint.lineTo(o + 5, -1); }
      paint.stroke();
      return context.createPattern(tile, "repeat");
    };

    function draw() {
      const ratio = devicePixelRatio || 1;
      width = canvas.clientWidth;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      const style = getComputedStyle(document.documentElement);
      const css = (name) => style.getPropertyValue(name).trim();
      const sans = css("--sans"), mono = css("--mono");
      const colors = COLORS.map(css);
      const waiting = hatch(style);
      context.clearRect(0, 0, width, height);
      context.textBaseline = "middle";

      // Time scale, and a faint line at each mark.
      const raw = span / Math.max(2, (width - GUTTER) / 120);
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
      context.font = "11.5px " + sans;
      context.lineWidth = 1;
      for (let i = Math.ceil(from / step); i * step <= from + span; i++) {
        const x = Math.round(xOf(i * step)) + 0.5;
        context.strokeStyle = css("--rule");
        context.beginPath();
        context.moveTo(x, AXIS - 5);
        context.lineTo(x, height);
        context.stroke();
        context.fillStyle = css("--faint");
        context.textAlign = "center";
        if (x > GUTTER + 12 && x < width - 30) context.fillText(time(i * step), x, 12);
      }

      panels.forEach((panel, p) => {
        const top = topOf(p);
        context.textAlign = "left";
        context.fillStyle = css("--panel");
        context.fillRect(GUTTER, top - 22, context.measureText(panel.basis + "   " + time(panel.step)).width + 40, 18);
        context.fillStyle = css("--ink");
        context.font = "620 12.5px " + sans;
        const title = panel.basis[0].toUpperCase() + panel.basis.slice(1);
        context.fillText(title, GUTTER, top - 13);
        const shift = context.measureText(title).width + 10;
        context.font = "12.5px " + sans;
        context.fillStyle = css("--faint");
        context.fillText(time(panel.step), GUTTER + shift, top - 13);
        panel.lanes.forEach((lane, l) => {
          const y = top + l * laneHeight;
          const h = laneHeight - (laneHeight > 10 ? 2 : 1);
          if (laneHeight >= 11 || l % Math.ceil(12 / laneHeight) === 0) {
            context.font = "11.5px " + sans;
            context.textAlign = "right";
            context.fillStyle = css("--faint");
            context.fillText(laneHeight >= 11 && nLanes <= 16 ? "rank " + l : String(l), GUTTER - 12, y + h / 2 + 0.5);
          }
          context.save();
          context.beginPath();
          context.rect(GUTTER, y, width - GUTTER - 14, h);
          context.clip();
          context.fillStyle = css("--idle");
          context.fillRect(GUTTER, y, Math.max(0, xOf(Math.min(panel.step, from + span)) - GUTTER), h);
          // Events too short to be told apart share pixel columns, each painted as what fills it most.
          let column = -1;
          const filled = new Float64Array(LABELS.length + 1);
          const flush = () => {
            if (column < 0) return;
            let most = 0;
            for (let c = 1; c < filled.length; c++) if (filled[c] > filled[most]) most = c;
            if (filled[most] > 0.05) {
              context.globalAlpha = most === LABELS.length || shown[most] ? 1 : 0.1;
              context.fillStyle = most === LABELS.length ? css("--wait") : colors[most];
              context.fillRect(column, y, 1, h);
              context.globalAlpha = 1;
            }
            filled.fill(0);
            column = -1;
          };
          for (let i = firstAfter(lane, from); i < lane.n && lane.start[i] < from + span; i++) {
            const left = xOf(lane.start[i]), right = xOf(lane.end[i]);
            const waitPart = lane.wait[i] > 0 ? Math.min(1, lane.wait[i] / Math.max(1, lane.duration[i])) : 0;
            if (right - left < 2.5) {
              for (let at = left; at < right; ) {
                const cell = Math.floor(at), next = Math.min(right, cell + 1);
                if (cell !== column) { flush(); column = cell; }
                filled[lane.category[i]] += (next - at) * (1 - waitPart);
                filled[LABELS.length] += (next - at) * waitPart;
                at = next;
              }
              continue;
            }
            flush();
            const x1 = Math.round(left), w = Math.max(1, Math.round(right) - x1);
            context.globalAlpha = shown[lane.category[i]] ? 1 : 0.1;
            context.fillStyle = colors[lane.category[i]];
            context.fillRect(x1, y, w > 8 ? w - 1 : w, h);
            if (waitPart > 0) {
              context.fillStyle = w * waitPart < 7 ? css("--wait") : waiting;
              context.fillRect(x1, y, w * waitPart, h);
            }
            if (w > 46 && laneHeight >= 14) {
              context.font = "11px " + mono;
              context.textAlign = "left";
              const waited = w * waitPart;
              const room = Math.floor((w - waited - 10) / 6.7);
              const label = fit(data.names[lane.name[i]], room);
              if (label) {
                context.fillStyle = css("--on-color");
                context.fillText(label, Math.max(x1, GUTTER) + waited + 5, y + h / 2 + 0.5);
              }
            }
            context.globalAlpha = 1;
          }
          flush();
          context.restore();
        });
      });

      if (pointer && pointer.x > GUTTER) {
        context.strokeStyle = css("--faint");
        context.beginPath();
        context.moveTo(Math.round(pointer.x) + 0.5, AXIS - 6);
        context.lineTo(Math.round(pointer.x) + 0.5, height);
        context.stroke();
      }
      if (hover) {
        panels.forEach((panel, p) => {
          const lane = panel.lanes[hover.lane];
          const i = lane && (p === hover.panel ? hover.event : lane.at.get(hover.instruction));
          if (i === undefined || lane === undefined) return;
          const x1 = Math.max(xOf(lane.start[i]), GUTTER), x2 = Math.min(xOf(lane.end[i]), width - 14);
          if (x2 < GUTTER || x1 > width - 14) return;
          context.strokeStyle = css("--mark");
          context.lineWidth = 2;
          context.strokeRect(x1 - 1, topOf(p) + hover.lane * laneHeight - 1, Math.max(3, x2 - x1 + 1), laneHeight);
          context.lineWidth = 1;
        });
      }
    }

    // The end of a path says most.
    const fit = (name, room) => {
      if (room < 4) return "";
      if (name.length <= room) return name;
      const parts = name.split(".");
      for (let i = 1; i < parts.length; i++) {
        const tail = parts.slice(i).join(".");
        if (tail.length <= room) return tail;
      }
      return parts[parts.length - 1].slice(0, room - 1) + "…";
    };

    const find = (x, y) => {
      for (let p = 0; p < panels.length; p++) {
        const l = Math.floor((y - topOf(p)) / laneHeight);
        const lane = panels[p].lanes[l];
        if (l < 0 || !lane || x < GUTTER || x > width - 14) continue;
        const t = tOf(x), slack = (span / width) * 1.5;
        const i = firstAfter(lane, t - slack);
        if (i < lane.n && lane.start[i] <= t + slack) {
          return { panel: p, lane: l, event: i, instruction: lane.instruction[i] };
        }
      }
      return null;
    };

    const describe = (event) => {
      const lane = panels[hover.panel].lanes[hover.lane], i = hover.event;
      const rows = [
        ["rank", String(hover.lane)],
        ["kind", LABELS[lane.category[i]]],
        ["starts at", time(lane.start[i])],
      ];
      panels.forEach((panel, p) => {
        const other = panel.lanes[hover.lane];
        const j = other && (p === hover.panel ? i : other.at.get(hover.instruction));
        if (j === undefined || other === undefined) return;
        const wait = other.wait[j] > 0 ? " (waits " + time(other.wait[j]) + ")" : "";
        rows.push([panel.basis, time(other.duration[j]) + wait]);
      });
      const busy = Math.max(1, lane.duration[i] - lane.wait[i]);
      if (lane.flops[i] > 0) rows.push(["work", ladder(lane.flops[i], SI, "FLOP") + " · " + ladder(lane.flops[i] / busy * 1e9, SI, "FLOP/s")]);
      if (lane.bytes[i] > 0) rows.push(["data", size(lane.bytes[i]) + " · " + ladder(lane.bytes[i] / busy * 1e9, SI, "B/s")]);
      rows.push(["instruction", String(lane.instruction[i])]);
      showTip(event.clientX, event.clientY, data.names[lane.name[i]], rows);
    };

    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, from };
      canvas.setPointerCapture(event.pointerId);
      canvas.classList.add("dragging");
    });
    const release = () => { drag = null; canvas.classList.remove("dragging"); };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      pointer = { x: event.clientX - box.left, y: event.clientY - box.top };
      if (drag) {
        from = drag.from - ((event.clientX - drag.x) / (width - GUTTER - 14)) * span;
        clamp();
        hover = null;
        hideTip();
      } else {
        hover = find(pointer.x, pointer.y);
        if (hover) describe(event); else hideTip();
      }
      redraw();
    });
    canvas.addEventListener("pointerleave", () => { hover = pointer = null; hideTip(); redraw(); });
    canvas.addEventListener("dblclick", (event) => zoom(event.shiftKey ? 4 : 0.25, event.clientX - canvas.getBoundingClientRect().left));
    canvas.addEventListener("wheel", (event) => {
      const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault();
        zoom(Math.exp(event.deltaY * 0.0025), event.clientX - canvas.getBoundingClientRect().left);
      } else if (sideways || event.shiftKey) {
        event.preventDefault();
        from += ((sideways ? event.deltaX : event.deltaY) / width) * span;
        clamp();
        redraw();
      }
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const middle = GUTTER + (width - GUTTER) / 2;
      if (event.key === "ArrowLeft") from -= span / 8;
      else if (event.key === "ArrowRight") from += span / 8;
      else if (event.key === "+" || event.key === "=") return zoom(0.6, middle);
      else if (event.key === "-") return zoom(1 / 0.6, middle);
      else if (event.key === "0" || event.key === "Home") { from = 0; span = total * 1.005; }
      else return;
      event.preventDefault();
      clamp();
      redraw();
    });
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => {
        const middle = GUTTER + (width - GUTTER) / 2;
        if (button.dataset.zoom === "fit") { from = 0; span = total * 1.005; redraw(); }
        else zoom(button.dataset.zoom === "in" ? 0.5 : 2, middle);
      });
    }
    for (const key of document.querySelectorAll("button.key")) {
      key.addEventListener("click", () => {
        const c = Number(key.dataset.category);
        shown[c] = !shown[c];
        key.setAttribute("aria-pressed", String(shown[c]));
        redraw();
      });
    }
    new ResizeObserver(redraw).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("beforeprint", draw);
    addEventListener("afterprint", draw);
    draw();
  }

  // A vertical line and figures under the pointer of an SVG chart.
  function chartCursor(id, rowsAt) {
    const svg = document.getElementById(id);
    if (!svg) return;
    const cursor = svg.querySelector(".cursor");
    const { width, height } = svg.viewBox.baseVal;
    const left = Number(svg.dataset.left), right = Number(svg.dataset.right);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      const part = (x - left) / (width - left - right);
      const found = part >= 0 && part <= 1 ? rowsAt(part) : null;
      if (!found) { cursor.setAttribute("d", ""); hideTip(); return; }
      cursor.setAttribute("d", "M" + (left + found.part * (width - left - right)).toFixed(1) + " 22V" + (height - 34));
      showTip(event.clientX, event.clientY, found.title, found.rows);
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("d", ""); hideTip(); });
  }

  function memoryAt(part) {
    const n = Math.max(...data.memory.map((rank) => rank.live.length));
    const i = Math.min(n - 1, Math.floor(part * n));
    const first = data.memory.find((rank) => i < rank.live.length);
    const rows = [["instruction", String(i)]];
    const same = data.memory.every((rank) => rank.live[i] === first.live[i]);
    if (same && data.memory.length > 1) rows.push(["every rank", size(first.live[i])]);
    else data.memory.slice(0, 16).forEach((rank, r) => { if (i < rank.live.length) rows.push(["rank " + r, size(rank.live[i])]); });
    return { part: (i + 0.5) / n, title: data.names[first.name[i]], rows };
  }

  function lossAt(part) {
    const n = data.losses.length;
    const i = Math.round(part * Math.max(1, n - 1));
    if (i >= n || data.losses[i] === null) return null;
    return { part: i / Math.max(1, n - 1), title: "step " + (i + 1), rows: [["loss", data.losses[i].toFixed(4)]] };
  }

  function contents() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          for (const a of links.values()) a.classList.remove("here");
          links.get(entry.target.id)?.classList.add("here");
        }
      }
    }, { rootMargin: "-10% 0px -80% 0px" });
    for (const section of document.querySelectorAll("section")) observer.observe(section);
  }
})();
