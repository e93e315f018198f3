"use strict";
// Draws the charts that the page holds as JSON. Colours in it are names ("@ink") of the style
// sheet's variables, so that day and night are decided in one place.
{
  const night = matchMedia("(prefers-color-scheme: dark)");
  // A finger that drags wants to scroll the page.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const variable = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const painted = (value) =>
    typeof value === "string" && value.startsWith("@") ? variable(value.slice(1)) : value;
  const read = (source) => JSON.parse(source.textContent, (key, value) => {
    if (key === "colorscale") return value.map(([at, colour]) => [at, painted(colour)]);
    return key.endsWith("color") ? painted(value) : value;
  });

  const axis = (side, own) => ({
    // Room on its own side only: pushed from all sides at once, some charts never settle.
    automargin: side,
    gridcolor: variable("line"),
    zeroline: false,
    ticklabelstandoff: 6,
    ticks: "",
    ...own,
    title: { standoff: 8, font: { size: 12 }, ...own.title },
  });
  const layout = (own, width) => ({
    height: 300,
    margin: { l: 8, r: 20, t: 10, b: 8 },
    showlegend: false,
    dragmode,
    hovermode: "closest",
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 12, color: variable("muted") },
    hoverlabel: {
      bgcolor: variable("card"),
      bordercolor: variable("edge"),
      font: { color: variable("ink") },
      namelength: -1,
    },
    ...own,
    xaxis: axis("bottom", {
      linecolor: variable("edge"),
      // About 60 pixels for a label, beside names or numbers on the left.
      nticks: Math.max(Math.floor((width - (own.yaxis.ticktext ? 130 : 40)) / 60), 3),
      ...own.xaxis,
    }),
    yaxis: axis("left", own.yaxis),
  });
  const config = { displayModeBar: false, responsive: true };

  const legend = (entries, hidden, draw) => {
    const list = document.createElement("ul");
    list.className = "legend";
    for (const { text, colour, group, stroke } of entries) {
      const button = document.createElement("button");
      button.setAttribute("aria-pressed", "true");
      const swatch = document.createElement("span");
      swatch.className = stroke;
      swatch.style.color = `var(--${colour})`;
      button.append(swatch, text);
      button.addEventListener("click", () => {
        if (!hidden.delete(group)) hidden.add(group);
        button.setAttribute("aria-pressed", String(!hidden.has(group)));
        draw();
      });
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    }
    return list;
  };

  const draws = [...document.querySelectorAll(".chart")].map((place) => {
    const source = place.nextElementSibling;
    const hidden = new Set();
    const draw = () => {
      const { data, layout: own } = read(source);
      for (const trace of data) trace.visible = !hidden.has(trace.legendgroup);
      Plotly.react(place, data, layout(own, place.clientWidth), config);
    };
    const entries = read(source).legend;
    if (entries.length > 1) place.before(legend(entries, hidden, draw));
    draw();
    return draw;
  });
  night.addEventListener("change", () => draws.forEach((draw) => draw()));
}
