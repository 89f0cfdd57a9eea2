// node-postgres with its pool, cursors and COPY streams.

import assert from 'node:assert/strict'
import { pipeline } from 'node:stream/promises'
import { Readable, Writable } from 'node:stream'
import pg from 'pg'
import Cursor from 'pg-cursor'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import { afterCancel, place, refused, run, turns, until } from './harness.mjs'

async function connect(at, options = {}) {
  const client = new pg.Client({ connectionString: at.url, ...options })
  client.on('error', () => {})
  await client.connect()
  return client
}

async function connected(at, work, count = 1) {
  const clients = await Promise.all(Array.from({ length: count }, () => connect(at)))
  try {
    return await work(...clients)
  } finally {
    await Promise.all(clients.map((client) => client.end()))
  }
}

const rows = (result) => result.rows.map((row) => Object.values(row))

async function login(at) {
  const { host, port, user, password, database } = at
  const seen = []
  for (const options of [
    { connectionString: at.url },
    { host, port, user, password, database, application_name: 'by keywords', statement_timeout: 12345 },
    { connectionString: at.url, options: '-c timezone=Asia/Tokyo -c work_mem=7MB' },
  ]) {
    const client = new pg.Client(options)
    await client.connect()
    const names = ['application_name', 'statement_timeout', 'timezone', 'work_mem', 'client_encoding']
    seen.push(rows(await client.query('SELECT current_user, current_database()')))
    for (const name of names) seen.push(rows(await client.query(`SHOW ${name}`)))
    await client.end()
  }
  return seen
}

function values(at) {
  return connected(at, async (client) => {
    const seen = []
    for (const [type, value] of [
      ['int4', -5], ['int8', '9223372036854775807'], ['float8', 1e300], ['numeric', '1234567890.0987654321'],
      ['bool', true], ['text', 'Zürich 北京 🐘 \' " \\ \n'], ['text', 'x'.repeat(100000)],
      ['bytea', Buffer.from(Array.from({ length: 5000 }, (_, n) => n % 256))],
      ['timestamptz', new Date('2024-02-29T23:59:59.999Z')], ['int4[]', [1, null, 3]], ['text[]', ['a,b', '"', null]],
      ['jsonb', { a: [1, 2.5, null, 'ü'] }], ['uuid', '00000000-0000-0000-0000-000000000007'], ['text', null],
    ]) {
      const { rows, fields } = await client.query(`SELECT $1::${type} AS v`, [value])
      assert.deepEqual(rows[0].v, value)
      seen.push([rows, fields.map((field) => [field.name, field.dataTypeID])])
    }
    const several = await client.query("SELECT 1 AS a; SELECT 'two' AS b; CREATE TEMP TABLE t (); DROP TABLE t")
    return [...seen, several.map((each) => [each.command, each.rows])]
  })
}

function transactions(at) {
  return connected(at, async (client) => {
    await client.query('DROP TABLE IF EXISTS tx')
    await client.query('CREATE TABLE tx (id int CONSTRAINT one PRIMARY KEY, note text)')
    const insert = (id, note) => client.query('INSERT INTO tx VALUES ($1, $2)', [id, note])
    await client.query('BEGIN ISOLATION LEVEL SERIALIZABLE')
    await insert(1, 'kept')
    await client.query('SAVEPOINT s')
    await insert(2, 'undone')
    const seen = [await refused(insert(1, 'doubled')), await refused(client.query('SELECT 1'))]
    await client.query('ROLLBACK TO s')
    await insert(3, 'kept')
    await client.query('COMMIT')
    await client.query('BEGIN')
    await insert(4, 'undone')
    await client.query('ROLLBACK')
    seen.push(rows(await client.query('SELECT * FROM tx ORDER BY id')))
    assert.deepEqual(seen.at(-1), [[1, 'kept'], [3, 'kept']])
    return seen
  })
}

function errors(at) {
  return connected(at, async (client) => [
    await refused(client.query('SELEC 1')),
    await refused(client.query('SELECT * FROM nowhere WHERE a = $1', [1])),
    await refused(client.query('SELECT 1/$1::int', [0])),
    await refused(client.query('SELECT 1; SELECT 1/0; SELECT 2')),
    await refused(client.query({ name: 'broken', text: 'SELECT $1::int + nothing', values: [1] })),
    await refused(client.query("DO $$ BEGIN RAISE 'own' USING ERRCODE = 'AB123', HINT = 'h', DETAIL = 'd'; END $$")),
    rows(await client.query("SELECT 'goes on'")),
  ])
}

function notices(at) {
  return connected(at, async (client) => {
    const heard = []
    client.on('notice', (notice) => heard.push([notice.severity, notice.message]))
    await client.query("DO $$ BEGIN RAISE NOTICE 'a ü'; RAISE WARNING 'b'; END $$")
    assert.equal(heard.length, 2)
    return heard
  })
}

// Named statements: the names of the neighbours', of which each is another statement here.
function prepared(at, backends) {
  return connected(at, async (client) => {
    await turns(new Set(), backends, async (n) => {
      const one = await client.query({ name: 'q1', text: 'SELECT pg_backend_pid() AS pid, $1::int + 1 AS v', values: [n] })
      assert.equal(one.rows[0].v, n + 1)
      const two = await client.query({ name: 'q2', text: 'SELECT $1::text AS v', values: [`ü${n}`] })
      assert.equal(two.rows[0].v, `ü${n}`)
      return one.rows[0].pid
    })
  })
}

function crowd(at) {
  return connected(at, async (...clients) => {
    await Promise.all(clients.map(async (client, number) => {
      for (let n = 0; n < 10; n++) {
        await client.query('BEGIN')
        const { rows } = await client.query({ name: 'q1', text: `SELECT $1::int * ${number} AS v`, values: [n] })
        assert.equal(rows[0].v, n * number)
        await client.query('COMMIT')
      }
    }))
  }, 12)
}

async function pool(at) {
  const made = new pg.Pool({ connectionString: at.url, max: 10, idleTimeoutMillis: 100 })
  const all = await Promise.all(Array.from({ length: 200 }, (_, n) => made.query('SELECT $1::int AS v', [n])))
  assert.deepEqual(all.map((each) => each.rows[0].v), Array.from({ length: 200 }, (_, n) => n))
  await made.end()
}

function cursors(at) {
  return connected(at, async (client) => {
    const seen = []
    await client.query('BEGIN')
    const cursor = client.query(new Cursor('SELECT n, n::text || $1 AS s FROM generate_series(1, 100) n', ['ü']))
    for (let part = await cursor.read(30); part.length; part = await cursor.read(30)) seen.push(part)
    await cursor.close()
    await client.query('COMMIT')
    assert.equal(seen.length, 4)
    const early = client.query(new Cursor('SELECT generate_series(1, 1000000)'))
    seen.push(await early.read(5))
    await early.close()
    await client.query('BEGIN')
    await client.query('DECLARE named SCROLL CURSOR FOR SELECT generate_series(1, 50)')
    seen.push(rows(await client.query('FETCH 10 FROM named')), rows(await client.query('FETCH LAST FROM named')))
    await client.query('COMMIT')
    return seen
  })
}

function copies(at) {
  return connected(at, async (client) => {
    await client.query('DROP TABLE IF EXISTS copied')
    await client.query('CREATE TABLE copied (id int PRIMARY KEY, note text)')
    const lines = (from, to) => Array.from({ length: to - from }, (_, n) => `${from + n}\tü${n}\n`)
    await pipeline(Readable.from(lines(0, 3000)), client.query(copyFrom('COPY copied FROM STDIN')))
    const seen = [await refused(pipeline(Readable.from(lines(2990, 3010)), client.query(copyFrom('COPY copied FROM STDIN'))))]
    const chunks = []
    const into = new Writable({ write(chunk, _, done) { chunks.push(chunk); done() } })
    await pipeline(client.query(copyTo('COPY (SELECT * FROM copied ORDER BY id) TO STDOUT')), into)
    const text = Buffer.concat(chunks).toString()
    assert.equal(text, lines(0, 3000).join(''))
    return [...seen, text.length, rows(await client.query('SELECT count(*) FROM copied'))]
  })
}

function listens(at) {
  return connected(at, async (client, other) => {
    const heard = []
    client.on('notification', ({ channel, payload }) => heard.push([channel, payload]))
    await client.query('LISTEN "Kanal ü"')
    for (const n of [1, 2, 3]) await other.query("SELECT pg_notify('Kanal ü', $1)", [`payload ${n}`])
    await until(() => heard.length === 3, 'three notifications')
    await client.query('UNLISTEN *')
    await other.query('NOTIFY "Kanal ü"')
    await client.query('SELECT 1')
    return heard
  }, 2)
}

function settings(at) {
  return connected(at, async (client, other) => {
    const names = ['search_path', 'timezone', 'work_mem']
    const shown = async (of) => Promise.all(names.map(async (name) => rows(await of.query(`SHOW ${name}`))[0][0]))
    const first = await shown(other)
    await client.query("SET search_path = pg_catalog; SET timezone = 'Asia/Tokyo'; SET work_mem = '7MB'")
    const seen = []
    for (let n = 0; n < 5; n++) {
      seen.push(await shown(client))
      assert.deepEqual(await shown(other), first)
    }
    await client.query('RESET ALL')
    return [...seen, await shown(client)]
  }, 2)
}

async function cancels(at, backends) {
  const client = await connect(at)
  const query = new pg.Query('SELECT pg_sleep(32)')
  const ended = new Promise((done) => {
    query.once('error', done)
    query.once('end', done)
  })
  client.query(query)
  await connected(place.direct, async (look) => {
    const running = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(32)' AND datname = current_database()"
    await until(async () => (await look.query(running)).rowCount, 'the query runs')
    new pg.Client({ connectionString: at.url }).cancel(client, query)
  })
  const { code, message } = await ended
  const after = await afterCancel(backends, () => client.query('SELECT $1::int', [1]))
  await client.end()
  return [code, message, rows(after)]
}

async function reconnects(at) {
  const client = await connect(at)
  const closed = new Promise((done) => client.once('end', done))
  await client.query('BEGIN')
  const { rows: [{ pid }] } = await client.query('SELECT pg_backend_pid() AS pid')
  await connected(place.direct, (killer) => killer.query('SELECT pg_terminate_backend($1, 5000)', [pid]))
  await closed
  return connected(at, async (again) => rows(await again.query("SELECT 'again'")))
}

await run([
  login, values, transactions, errors, notices, prepared, crowd, pool, cursors, copies, listens, settings,
  cancels, reconnects,
])
