// Which field options there are. @grafana/data applies a panel's defaults and overrides to the fields
// of a result, but asks a registry which options exist, and the registries are in Grafana's own bundle:
// these are theirs, less the editors. An option that is missing here would be ignored in silence, so
// draw.mjs fails on one (see unknownOptions).

import {
  FieldConfigOptionsRegistry,
  FieldType,
  booleanOverrideProcessor,
  dataLinksOverrideProcessor,
  displayNameOverrideProcessor,
  identityOverrideProcessor,
  numberOverrideProcessor,
  standardTransformers,
  standardTransformersRegistry,
  stringOverrideProcessor,
  thresholdsOverrideProcessor,
  unitOverrideProcessor,
  valueMappingsOverrideProcessor,
} from '@grafana/data';

const always = () => true;
const onNumbers = (field) => field.type === FieldType.number;

function option(path, process, { shouldApply = always, defaultValue, custom = false } = {}) {
  return {
    id: custom ? `custom.${path}` : path,
    path,
    name: path,
    isCustom: custom,
    process,
    shouldApply,
    defaultValue,
    settings: {},
    editor: () => null,
    override: () => null,
  };
}

const STANDARD = [
  option('displayName', displayNameOverrideProcessor),
  option('unit', unitOverrideProcessor),
  option('min', numberOverrideProcessor, { shouldApply: onNumbers }),
  option('max', numberOverrideProcessor, { shouldApply: onNumbers }),
  option('fieldMinMax', booleanOverrideProcessor, { shouldApply: onNumbers }),
  option('decimals', numberOverrideProcessor, { shouldApply: onNumbers }),
  option('thresholds', thresholdsOverrideProcessor),
  option('noValue', stringOverrideProcessor),
  option('links', dataLinksOverrideProcessor),
  option('actions', identityOverrideProcessor),
  option('color', identityOverrideProcessor),
  option('mappings', valueMappingsOverrideProcessor),
  option('filterable', booleanOverrideProcessor),
  option('description', stringOverrideProcessor),
];

// The defaults are those that Grafana gives a new panel: JSON may leave them out.
const CUSTOM = {
  timeseries: {
    drawStyle: 'line',
    lineInterpolation: 'linear',
    barAlignment: 0,
    barWidthFactor: 0.6,
    barMaxWidth: undefined,
    lineWidth: 1,
    fillOpacity: 0,
    gradientMode: 'none',
    fillBelowTo: undefined,
    lineStyle: undefined,
    lineColor: undefined,
    fillColor: undefined,
    spanNulls: false,
    insertNulls: false,
    showPoints: 'auto',
    showValues: false,
    pointSize: 5,
    pointColor: undefined,
    stacking: { mode: 'none', group: 'A' },
    transform: undefined,
    axisPlacement: 'auto',
    axisLabel: undefined,
    axisWidth: undefined,
    axisSoftMin: undefined,
    axisSoftMax: undefined,
    axisGridShow: undefined,
    axisCenteredZero: false,
    axisColorMode: 'text',
    axisBorderShow: false,
    scaleDistribution: { type: 'linear' },
    hideFrom: { legend: false, tooltip: false, viz: false },
    thresholdsStyle: { mode: 'off' },
  },
  table: {
    width: undefined,
    minWidth: undefined,
    align: 'auto',
    cellOptions: { type: 'auto' },
    inspect: false,
    hidden: undefined,
    hideHeader: undefined,
    hideFrom: undefined,
    filterable: undefined,
    footer: undefined,
    wrapText: undefined,
    wrapHeaderText: undefined,
    styleField: undefined,
    tooltip: undefined,
    displayMode: undefined,
  },
  stat: {},
};

const registries = new Map();

export function fieldRegistry(type) {
  let registry = registries.get(type);
  if (!registry) {
    const custom = Object.entries(CUSTOM[type]).map(([path, defaultValue]) =>
      option(path, identityOverrideProcessor, { custom: true, defaultValue })
    );
    registry = new FieldConfigOptionsRegistry(() => [...STANDARD, ...custom]);
    registries.set(type, registry);
  }
  return registry;
}

/** The panel's field configuration, with Grafana's defaults where it says nothing. */
export function fieldConfigOf(panel) {
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  const custom = { ...defaults.custom };
  for (const [name, value] of Object.entries(CUSTOM[panel.type])) {
    custom[name] ??= value;
  }
  // JSON has no -Infinity: the base step of thresholds is null there
  const steps = (thresholds) =>
    thresholds && {
      ...thresholds,
      steps: thresholds.steps.map((step) => ({ ...step, value: step.value ?? -Infinity })),
    };
  return {
    defaults: {
      ...defaults,
      custom,
      // what Grafana takes where the panel says nothing
      color: defaults.color ?? { mode: panel.type === 'timeseries' ? 'palette-classic' : 'thresholds' },
      thresholds: steps(defaults.thresholds) ?? {
        mode: 'absolute',
        steps: [{ value: -Infinity, color: 'green' }, { value: 80, color: 'red' }],
      },
    },
    overrides: overrides.map((rule) => ({
      ...rule,
      properties: rule.properties.map((property) =>
        property.id === 'thresholds' ? { ...property, value: steps(property.value) } : property
      ),
    })),
  };
}

/** Options of the panel that are not drawn because nothing here knows them. */
export function unknownOptions(panel) {
  const registry = fieldRegistry(panel.type);
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  const ids = [
    ...Object.keys(defaults).filter((name) => name !== 'custom'),
    ...Object.keys(defaults.custom ?? {}).map((name) => `custom.${name}`),
    ...overrides.flatMap((rule) => rule.properties.map((property) => property.id)),
  ];
  return [...new Set(ids)].filter((id) => !registry.getIfExists(id));
}

standardTransformersRegistry.setInit(() =>
  [...new Set(Object.values(standardTransformers))].map((transformation) => ({
    id: transformation.id,
    name: transformation.name,
    description: transformation.description,
    transformation,
    editor: () => null,
    imageDark: '',
    imageLight: '',
  }))
);
