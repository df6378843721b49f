"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // ---- light and dark: the system's choice until the reader makes one
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const toggle = document.getElementById("theme");
  const remember = (theme) => { try { localStorage.setItem("unbraid-theme", theme); } catch { /* files may not have a store */ } };
  try { const kept = localStorage.getItem("unbraid-theme"); if (kept === "dark" || kept === "light") root.dataset.theme = kept; } catch { /* as above */ }

  // ---- plots
  const config = (night) => {
    const ink = night ? "#e4e8ed" : "#1a1d21", soft = night ? "#a7b0bb" : "#545c66", grid = night ? "#333b45" : "#e1e5ea";
    const back = night ? "#14181d" : "#ffffff";
    const category = night // distinct to the colour-blind (after Okabe and Ito), at least 3:1 on the page
      ? ["#56b4e9", "#f0a13a", "#2bc79a", "#e58bc0", "#f0e442", "#ff8a5b", "#b0b8c1", "#9d9bff"]
      : ["#0072b2", "#c44e00", "#007a5a", "#a6478f", "#8a6d00", "#2f5fd0", "#5f6670", "#7a2048"];
    const words = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
    return {
      background: "transparent", font: getComputedStyle(document.body).fontFamily, view: { stroke: null },
      axis: { ...words, gridColor: grid, tickColor: soft, domainColor: soft }, legend: { ...words, symbolStrokeWidth: 3 },
      range: {
        category,
        diverging: night ? ["#ff9e57", "#8a4a1c", "#262b31", "#1f5f8a", "#6ec1ff"] : ["#a84300", "#f2b48c", "#f7f7f7", "#92c1e0", "#005a8f"],
        heatmap: night ? ["#20262d", "#2f6f9f", "#8fd0ff"] : ["#f2f6fa", "#6fa8d1", "#004b7a"],
        ramp: night ? ["#20262d", "#2f6f9f", "#8fd0ff"] : ["#f2f6fa", "#6fa8d1", "#004b7a"],
      },
      mark: { color: category[0] }, rule: { color: ink }, tick: { color: ink }, line: { strokeWidth: 2 },
      style: {
        reference: { stroke: soft, color: soft, strokeDash: [5, 4], strokeWidth: 1.5 },
        far: { color: back, fontSize: 12 }, near: { color: ink, fontSize: 12 }, mark: { color: ink, fontSize: 12 },
      },
    };
  };
  const drawn = new Map(); // element -> its view
  const specOf = (box) => JSON.parse(document.getElementById(box.dataset.spec).textContent);
  const draw = async (box) => {
    if (!window.vegaEmbed) return;
    drawn.get(box)?.finalize();
    // ast: expressions are interpreted, so that the page's policy need not allow code from text
    const view = await window.vegaEmbed(box, specOf(box), { actions: false, renderer: "svg", ast: true, logLevel: 1, config: config(dark()) });
    drawn.set(box, view);
    box.dataset.drawn = dark() ? "dark" : "light";
  };
  const plots = [...document.querySelectorAll(".plot")];
  const watch = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) if (isIntersecting) { watch.unobserve(target); draw(target); }
  }, { rootMargin: "800px" });
  plots.forEach((box) => {
    box.style.minHeight = `${specOf(box).height + 45}px`; // with its axis: what lies below moves little when it is drawn
    watch.observe(box);
  });
  addEventListener("beforeprint", () => plots.filter((box) => !drawn.has(box)).forEach(draw));

  const themed = () => { toggle.setAttribute("aria-pressed", String(dark())); drawn.forEach((_, box) => draw(box)); };
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remember(root.dataset.theme); themed(); });
  system.addEventListener("change", themed);
  themed();

  // ---- tables: order and choice of lines
  const key = (text) => {
    const number = /^[+-]?(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?/.exec(text.trim());
    return number ? parseFloat(number[0].replaceAll(",", "")) : text.trim();
  };
  const absent = (text) => text.trim() === "-" || text.trim() === "";
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? next : "none"));
      const sign = next === "ascending" ? 1 : -1, text = (row) => row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => absent(text(a)) - absent(text(b)) || sign * compare(key(text(a)), key(text(b))));
      body.append(...rows); // dashes stay last in either order
    }));
    const box = table.closest(".table"), field = box.querySelector("input"), count = box.querySelector("output");
    field?.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean), rows = [...body.rows];
      for (const row of rows) { const text = row.textContent.toLowerCase(); row.hidden = !words.every((word) => text.includes(word)); }
      count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} lines`;
    });
  });

  // ---- commands
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(code); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }));
})();
