// What a dashboard of ours is, put together from Grafana's own types: those leave open what belongs
// to a kind of panel (options, fieldConfig.defaults.custom) and to a data source (targets), since
// plugins decide it. Here a panel is one of the kinds we use, and each has its plugin's types.

import type * as Grafana from '@grafana/schema';
import type * as Heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as Stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as StateTimeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as Table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as TimeSeries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type { Dataquery } from '@grafana/grafana-foundation-sdk/prometheus';
import type * as Units from '@grafana/grafana-foundation-sdk/units';

// JSON has the texts of enums, and a type that is open to any key would let mistakes pass.
type Json<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends Array<infer Item>
      ? Array<Json<Item>>
      : T extends object
        ? { [Key in keyof T]: Json<T[Key]> }
        : T;

type Unit = Exclude<(typeof Units)[keyof typeof Units], Function>;
type Source = { type: 'prometheus'; uid: '${datasource}' };
type Query = Json<Omit<Dataquery, '_implementsDataqueryVariant' | 'datasource' | 'refId'>> & { refId: string };
type Property = { id: string; value: unknown };
type Defaults<Custom> = Json<Omit<Grafana.FieldConfig, 'custom' | 'unit'>> & { unit: Unit; custom?: Json<Custom> };

type Typed<Type extends string, Options, Custom> = Json<
  Omit<Grafana.Panel, 'type' | 'options' | 'fieldConfig' | 'targets' | 'datasource' | 'id' | 'gridPos' | 'title' | 'description'>
> & {
  type: Type;
  id: number;
  title: string;
  description: string;
  gridPos: Grafana.GridPos;
  datasource: Source;
  options: Json<Options>;
  fieldConfig: {
    defaults: Defaults<Custom>;
    overrides: Array<{ matcher: { id: 'byName' | 'byRegexp'; options: string }; properties: Property[] }>;
  };
  targets: Array<Query & { datasource: Source }>;
};

type Panel =
  | Typed<'heatmap', Heatmap.Options, Heatmap.FieldConfig>
  | Typed<'stat', Stat.Options, never>
  | Typed<'state-timeline', StateTimeline.Options, StateTimeline.FieldConfig>
  | Typed<'table', Table.Options, Table.FieldConfig>
  | Typed<'timeseries', TimeSeries.Options, TimeSeries.FieldConfig>;

type Row = Json<Omit<Grafana.RowPanel, 'panels' | 'type'>> & { type: 'row'; panels: Panel[] };

// Title and text of an annotation belong to the Prometheus data source, which no package has types of.
type Annotation = Json<Omit<Grafana.AnnotationQuery, 'target' | 'datasource'>> & {
  datasource: Source;
  target: Query;
  titleFormat: string;
  textFormat: string;
  tagKeys: string;
};

export type Board = Json<Omit<Grafana.Dashboard, 'panels' | 'annotations' | 'uid' | 'title'>> & {
  uid: string;
  title: string;
  panels: Array<Panel | Row>;
  annotations: { list: Annotation[] };
};
