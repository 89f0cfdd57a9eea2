// A panel: Grafana's frame around Grafana's visualization of the panel's frames.

import {
  applyFieldOverrides,
  cacheFieldDisplayNames,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
  transformDataFrame,
} from '@grafana/data';
import {
  BigValue,
  PanelChrome,
  TimeSeries,
  VizRepeater,
  useTheme2,
} from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { useLayoutEffect } from 'react';
import { lastValueFrom } from 'rxjs';

import { fieldConfigOf, fieldRegistry } from './fields.js';
import { framesOf } from './frames.js';
import { addMarks } from './marks.js';

/** The panel's data as its visualization wants it: transformed, then configured. */
export async function prepare(panel, range, theme, timeZone) {
  const transformations = (panel.transformations ?? []).filter(({ disabled }) => !disabled);
  const context = { interpolate: (text) => text };
  const transformed = await lastValueFrom(transformDataFrame(transformations, framesOf(panel, range), context));
  const fieldConfig = fieldConfigOf(panel);
  const frames = applyFieldOverrides({
    data: transformed,
    fieldConfig,
    fieldConfigRegistry: fieldRegistry(panel.type),
    replaceVariables: (text) => text,
    theme,
    timeZone,
  });
  cacheFieldDisplayNames(frames); // tables take their headings from there
  return { frames, fieldConfig };
}

export function Panel({ panel, data, width, height, timeRange, timeZone, annotations }) {
  const Visualization = VISUALIZATIONS[panel.type];
  const empty = data.frames.every((frame) => frame.length === 0);
  const { noValue } = data.fieldConfig.defaults;
  return (
    <PanelChrome
      width={width}
      height={height}
      title={panel.title}
      description={panel.description}
      displayMode={panel.transparent ? 'transparent' : 'default'}
      padding={panel.type === 'table' ? 'none' : 'md'}
    >
      {(innerWidth, innerHeight) =>
        empty ? (
          <div className="no-data">{noValue ?? 'No data'}</div>
        ) : (
          <Visualization
            {...{ panel, data, timeRange, timeZone, annotations }}
            width={innerWidth}
            height={innerHeight}
          />
        )
      }
    </PanelChrome>
  );
}

function TimeSeriesPanel({ panel, data, width, height, timeRange, timeZone, annotations }) {
  return (
    <TimeSeries
      frames={data.frames}
      structureRev={1}
      timeRange={timeRange}
      timeZone={timeZone}
      width={width}
      height={height}
      legend={{ calcs: [], displayMode: 'list', placement: 'bottom', showLegend: true, ...panel.options?.legend }}
      options={panel.options}
    >
      {(config) => <Marks config={config} exemplars={panel.exemplars} annotations={annotations} />}
    </TimeSeries>
  );
}

function Marks({ config, exemplars, annotations }) {
  const theme = useTheme2();
  // runs before the plot is made: it is the parent's effect
  useLayoutEffect(() => addMarks(config, { exemplars, annotations, theme }), [config]);
  return null;
}

function StatPanel(props) {
  const { panel, data, timeRange } = props;
  const options = { graphMode: 'area', colorMode: 'value', justifyMode: 'auto', textMode: 'auto', ...panel.options };
  const named = data.fieldConfig.defaults.displayName || !panel.title;
  return (
    <Repeated {...props} options={options} sparkline={options.graphMode !== 'none'}>
      {({ value, width, height, count, alignmentFactors, theme }) => (
        <BigValue
          {...{ width, height, count, alignmentFactors, theme }}
          value={value.display}
          sparkline={value.sparkline && { ...value.sparkline, timeRange }}
          colorMode={options.colorMode}
          graphMode={options.graphMode}
          justifyMode={options.justifyMode}
          textMode={options.textMode === 'auto' && named ? 'value_and_name' : options.textMode}
          text={options.text}
          disableWideLayout={!(options.wideLayout ?? true)}
        />
      )}
    </Repeated>
  );
}

/** One drawing for each value of the panel. */
function Repeated({ data, width, height, timeZone, options, sparkline = false, children }) {
  const theme = useTheme2();
  const values = getFieldDisplayValues({
    fieldConfig: data.fieldConfig,
    reduceOptions: { calcs: ['lastNotNull'], values: false, ...options.reduceOptions },
    replaceVariables: (text) => text,
    data: data.frames,
    sparkline,
    percentChange: false,
    timeZone,
    theme,
  });
  return (
    <VizRepeater
      source={data}
      getValues={() => values}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={(value) => children({ ...value, theme })}
      width={width}
      height={height}
      itemSpacing={3}
      renderCounter={1}
      autoGrid={true}
      orientation={options.orientation ?? 'auto'}
    />
  );
}

function TablePanel({ panel, data, width, height, timeRange }) {
  const { sortBy, showHeader = true, cellHeight, frameIndex = 0 } = panel.options ?? {};
  return (
    <TableNG
      data={data.frames[frameIndex] ?? data.frames[0]}
      width={width}
      height={height}
      noHeader={!showHeader}
      showTypeIcons={false}
      resizable={true}
      initialSortBy={sortBy}
      cellHeight={cellHeight}
      timeRange={timeRange}
      fieldConfig={data.fieldConfig}
      enableVirtualization={false}
      structureRev={1}
    />
  );
}

const VISUALIZATIONS = {
  timeseries: TimeSeriesPanel,
  stat: StatPanel,
  table: TablePanel,
};
