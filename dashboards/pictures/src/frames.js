// From an answer of Prometheus to the data frames that Grafana's Prometheus data source would make.

import { FieldType, toDataFrame } from '@grafana/data';

/** Frames of all targets of a panel, not yet configured. */
export function framesOf(panel, { from, to }) {
  const tables = panel.targets.filter((target) => target.format === 'table').length;
  return panel.targets.flatMap((target) =>
    target.format === 'table' ? tableFrames(target, tables) : seriesFrames(target, from, to)
  );
}

function seriesFrames(target, from, to) {
  return target.result.map((series) => {
    const samples = series.values ? onGrid(series.values, target.step, from, to) : [series.value];
    const { __name__: name, ...labels } = series.metric;
    const legend = legendOf(target, series.metric);
    return toDataFrame({
      refId: target.refId,
      name: legend,
      fields: [
        {
          name: 'Time',
          type: FieldType.time,
          values: samples.map(([time]) => time * 1000),
          config: { interval: target.step * 1000 },
        },
        {
          name: 'Value',
          type: FieldType.number,
          labels: name ? { __name__: name, ...labels } : labels,
          values: samples.map(([, text]) => number(text)),
          config: legend ? { displayNameFromDS: legend } : {},
        },
      ],
    });
  });
}

/** A sample for each step, as Grafana's panel fills it up: where nothing was, the line has a gap. */
function onGrid(samples, step, from, to) {
  const texts = new Map(samples);
  const first = Math.floor(from / step);
  const count = Math.floor(to / step) - first + 1;
  return Array.from({ length: count }, (_, place) => {
    const time = (first + place) * step;
    return [time, texts.get(time) ?? null];
  });
}

function tableFrames(target, tables) {
  const names = [...new Set(target.result.flatMap((series) => Object.keys(series.metric)))].sort();
  const rows = target.result.flatMap((series) =>
    (series.values ?? [series.value]).map(([time, text]) => ({ time, text, metric: series.metric }))
  );
  return [
    toDataFrame({
      refId: target.refId,
      meta: { preferredVisualisationType: 'table' },
      fields: [
        { name: 'Time', type: FieldType.time, values: rows.map((row) => row.time * 1000) },
        ...names.map((name) => ({
          name,
          type: FieldType.string,
          config: { filterable: true },
          values: rows.map((row) => row.metric[name] ?? ''),
        })),
        {
          name: tables > 1 ? `Value #${target.refId}` : 'Value',
          type: FieldType.number,
          values: rows.map((row) => number(row.text)),
        },
      ],
    }),
  ];
}

function legendOf(target, metric) {
  const format = target.legendFormat ?? '';
  const { __name__: name = '', ...labels } = metric;
  const pairs = Object.entries(labels).map(([label, value]) => `${label}="${value}"`);
  const whole = pairs.length || name ? `${name}{${pairs.join(', ')}}` : target.expr;
  if (format === '__auto') {
    return pairs.length || name ? '' : whole; // empty: named after the labels that differ
  }
  return format ? format.replace(/\{\{\s*(.+?)\s*\}\}/g, (_, label) => metric[label] ?? '') : whole;
}

function number(text) {
  if (text === null) {
    return null;
  }
  return { '+Inf': Infinity, '-Inf': -Infinity, NaN: NaN }[text] ?? Number(text);
}
