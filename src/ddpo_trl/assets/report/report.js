"use strict";
{
  const charts = JSON.parse(document.getElementById("curves").textContent);
  const plots = [];
  let selectedQueries = null; // reward queries of the round on the slider

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif';

  /** Four significant digits, with an exponent where zeros would take over. */
  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const short = Number(value.toPrecision(4));
    const text = size !== 0 && (size < 1e-3 || size >= 1e7) ? short.toExponential() : short.toLocaleString("en", { maximumFractionDigits: 6 });
    return text.replaceAll("-", "−");
  }

  /** A number on an axis, with as many decimals as it needs to differ from the next one. */
  function tick(value, increment) {
    if (value === 0) return "0";
    if (increment < 1e-4 && Math.abs(value) < 1e-2) return number(value);
    const decimals = Math.max(0, Math.ceil(-Math.log10(increment) - 1e-9));
    const exact = Number((increment * 10 ** decimals).toFixed(6)) % 1 === 0 ? decimals : decimals + 1;
    return value.toLocaleString("en", { minimumFractionDigits: exact, maximumFractionDigits: exact }).replaceAll("-", "−");
  }

  function axis(label) {
    const muted = colour("--muted");
    return {
      stroke: muted,
      font: FONT,
      labelFont: FONT,
      label,
      labelSize: label ? 20 : 0,
      labelGap: 2,
      grid: { stroke: colour("--grid"), width: 1 },
      ticks: { show: false },
      values: (_, splits, axis, space, increment) => splits.map((split) => (split === null ? "" : tick(split, increment))),
    };
  }

  function line(index, values) {
    const stroke = colour(`--tone-${index}`);
    return { stroke, width: 2, points: { size: 5, fill: stroke, show: values.length <= 40 } };
  }

  /** While the pointer is in this chart, or in any other, the values there replace the unit. */
  function reading(chart, holder) {
    const [unit, label] = holder.parentElement.querySelectorAll(".unit, .reading");
    const text = (index) => {
      const lines = Object.entries(chart.lines);
      const values = lines.map(([name, line]) => (lines.length > 1 ? `${name} ` : "") + number(line[index]));
      return `${values.join(", ")} at ${number(chart.queries[index])}`;
    };
    return {
      hooks: {
        setCursor: (plot) => {
          const index = plot.cursor.left < 0 ? null : plot.cursor.idx;
          label.textContent = index === null || index === undefined ? "" : text(index);
          unit.classList.toggle("covered", label.textContent !== "");
        },
      },
    };
  }

  /** A line in the first chart where the slider is. */
  function selection() {
    return {
      hooks: {
        drawAxes: (plot) => {
          if (selectedQueries === null) return;
          const x = Math.round(plot.valToPos(selectedQueries, "x", true));
          plot.ctx.save();
          plot.ctx.strokeStyle = colour("--muted");
          plot.ctx.lineWidth = devicePixelRatio;
          plot.ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
          plot.ctx.beginPath();
          plot.ctx.moveTo(x, plot.bbox.top);
          plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
          plot.ctx.stroke();
          plot.ctx.restore();
        },
      },
    };
  }

  function draw(holder) {
    const chart = charts[holder.dataset.chart];
    const lines = Object.values(chart.lines);
    const series = [{}, ...lines.map((values, index) => line(index, values))];
    const data = [chart.queries, ...lines];
    const bands = [];
    if (chart.spread) {
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      const mean = lines[0];
      data.push(mean.map((value, i) => value + chart.spread[i]), mean.map((value, i) => value - chart.spread[i]));
      series.push(edge, { ...edge });
      bands.push({ series: [data.length - 2, data.length - 1], fill: colour("--band") });
    }
    const options = {
      width: holder.clientWidth,
      height: holder.clientHeight,
      padding: [10, 12, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false, setScale: false }, sync: { key: "queries" }, points: { show: (plot, index) => index <= lines.length } },
      scales: { x: { time: false, range: (_, low, high) => [0, high] } },
      axes: [
        { ...axis("reward queries (images scored)"), size: 26, space: 60 },
        { ...axis(), size: (_, labels) => 14 + 7 * Math.max(3, ...(labels ?? []).map((label) => label.length)), gap: 8, space: 44 },
      ],
      series,
      bands,
      plugins: [reading(chart, holder), ...(holder.dataset.chart === "reward" ? [selection()] : [])],
    };
    return new uPlot(options, data, holder);
  }

  function drawAll() {
    for (const { plot } of plots.splice(0)) plot.destroy();
    for (const holder of document.querySelectorAll(".plot")) plots.push({ holder, plot: draw(holder) });
  }

  function connectSlider() {
    const slider = document.getElementById("round");
    if (!slider) return;
    const rounds = [...document.querySelectorAll(".round")];
    const label = document.getElementById("round-label");
    const buttons = { earlier: document.getElementById("earlier"), later: document.getElementById("later") };
    const show = () => {
      const chosen = rounds[slider.valueAsNumber];
      for (const round of rounds) round.classList.toggle("shown", round === chosen);
      label.textContent = chosen.dataset.label;
      slider.setAttribute("aria-valuetext", chosen.dataset.label);
      buttons.earlier.disabled = slider.value === slider.min;
      buttons.later.disabled = slider.value === slider.max;
      selectedQueries = chosen.dataset.queries === undefined ? null : Number(chosen.dataset.queries);
      for (const { plot } of plots) plot.redraw(false, false);
    };
    slider.addEventListener("input", show);
    buttons.earlier.addEventListener("click", () => { slider.stepDown(); show(); });
    buttons.later.addEventListener("click", () => { slider.stepUp(); show(); });
    show();
  }

  connectSlider();
  drawAll();
  new ResizeObserver(() => {
    for (const { holder, plot } of plots) {
      if (plot.width !== holder.clientWidth || plot.height !== holder.clientHeight) {
        plot.setSize({ width: holder.clientWidth, height: holder.clientHeight });
      }
    }
  }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}
