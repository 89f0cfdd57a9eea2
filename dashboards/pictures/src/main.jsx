// The page of one picture. draw.mjs calls window.draw(picture).

import '@grafana/react-data-grid/lib/styles.css';
import 'uplot/dist/uPlot.min.css';
import './page.css';

import { createTheme, dateTime } from '@grafana/data';
import { GlobalStyles, Icon, ThemeContext } from '@grafana/ui';
import { createRoot } from 'react-dom/client';

import { unknownOptions } from './fields.js';
import { Panel, prepare } from './panels.jsx';

// Grafana's grid, in CSS pixels
const COLUMNS = 24;
const ROW_HEIGHT = 30;
const GAP = 8;

const MARGIN = 16;
const TIME_ZONE = 'utc';

/** Draws the picture and returns complaints: options of panels that were not understood. */
window.draw = async (picture) => {
  const theme = createTheme({ colors: { mode: 'dark' } });
  const timeRange = rangeOf(picture);
  const panels = await Promise.all(
    picture.panels.map(async (panel) =>
      panel.type === 'row' ? { panel } : { panel, data: await prepare(panel, picture, theme, TIME_ZONE) }
    )
  );
  const root = createRoot(document.getElementById('root'));
  const styles = <GlobalStyles hackNoBackdropBlur={true} />;
  root.render(<ThemeContext.Provider value={theme}>{styles}</ThemeContext.Provider>);
  await fontsLoaded();
  root.render(
    <ThemeContext.Provider value={theme}>
      {styles}
      <header>
        <h1>{picture.title}</h1>
        <span>
          {picture.chosen.map((choice) => `${choice}, `)}
          {timeRange.from.utc().format('HH:mm:ss')} to {timeRange.to.utc().format('HH:mm:ss')} UTC
        </span>
      </header>
      <main style={{ height: boxOf({ x: 0, y: 0, w: COLUMNS, h: heightOf(picture) }).height }}>
        {panels.map(({ panel, data }) => {
          const box = boxOf(panel.gridPos);
          return (
            <div key={panel.id} className="cell" style={box}>
              {panel.type === 'row' ? (
                <h2>
                  <Icon name="angle-down" /> {panel.title}
                </h2>
              ) : (
                <Panel
                  {...{ panel, data, timeRange }}
                  width={box.width}
                  height={box.height}
                  timeZone={TIME_ZONE}
                  annotations={picture.annotations}
                />
              )}
            </div>
          );
        })}
      </main>
    </ThemeContext.Provider>
  );
  return panels
    .filter(({ data }) => data)
    .flatMap(({ panel }) => unknownOptions(panel).map((id) => `${panel.title}: unknown option ${id}`));
};

/** A canvas does not wait for its font: it takes another one. */
async function fontsLoaded() {
  for (const font of ['400 12px Inter', '500 12px Inter']) {
    while (!(await document.fonts.load(font)).length) {
      await new Promise(requestAnimationFrame); // until the styles that name the font are there
    }
  }
}

function rangeOf({ from, to }) {
  const range = { from: dateTime(from * 1000), to: dateTime(to * 1000) };
  return { ...range, raw: range };
}

function heightOf({ panels }) {
  return Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h));
}

function boxOf({ x, y, w, h }) {
  const column = (document.body.clientWidth - 2 * MARGIN + GAP) / COLUMNS;
  const row = ROW_HEIGHT + GAP;
  return { left: x * column, top: y * row, width: w * column - GAP, height: h * row - GAP };
}
