// What Grafana draws over a time series: exemplars as diamonds, annotations as dashed lines and regions.

const EXEMPLAR = 4.5; // half of a diamond's width in CSS pixels, about Grafana's
const LABEL = 28; // pixels of half a time below the axis: the last one is not to be cut off

/** Adds a drawing of the marks to the configuration of a plot that is not made yet. */
export function addMarks(config, { exemplars, annotations, theme }) {
  config.setPadding([null, LABEL, null, null]);
  config.addHook('draw', (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    annotations.forEach((annotation) => drawAnnotation(plot, annotation, theme));
    exemplars.forEach((exemplar) => drawExemplar(plot, config.scaleKeys[1], exemplar, theme));
    ctx.restore();
  });
}

function drawAnnotation(plot, { from, to, color }, theme) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  const start = plot.valToPos(from, 'x', true);
  const end = plot.valToPos(to, 'x', true);
  ctx.strokeStyle = ctx.fillStyle = theme.visualization.getColorByName(color);
  ctx.lineWidth = ratio;
  ctx.setLineDash([5 * ratio, 5 * ratio]);
  for (const x of new Set([start, end])) {
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.globalAlpha = 0.1;
  ctx.fillRect(start, bbox.top, end - start, bbox.height);
  ctx.globalAlpha = 1;
}

function drawExemplar(plot, scale, { time, value }, theme) {
  const { min, max } = plot.scales[scale];
  const x = plot.valToPos(time, 'x', true);
  const y = plot.valToPos(Math.min(Math.max(value, min), max), scale, true);
  const r = EXEMPLAR * devicePixelRatio;
  plot.ctx.setLineDash([]);
  plot.ctx.fillStyle = theme.visualization.getColorByName('light-blue');
  plot.ctx.beginPath();
  plot.ctx.moveTo(x, y - r);
  plot.ctx.lineTo(x + r, y);
  plot.ctx.lineTo(x, y + r);
  plot.ctx.lineTo(x - r, y);
  plot.ctx.fill();
}
