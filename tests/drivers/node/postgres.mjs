// postgres.js, which prepares every query and keeps a pool of its own.

import assert from 'node:assert/strict'
import { pipeline } from 'node:stream/promises'
import { Readable } from 'node:stream'
import postgres from 'postgres'
import { afterCancel, place, refused, run, turns, until } from './harness.mjs'

async function connected(at, work, options = {}) {
  const sql = postgres(at.url, { max: 1, onnotice: () => {}, ...options })
  try {
    return await work(sql)
  } finally {
    await sql.end({ timeout: 2 })
  }
}

const plain = (found) => found.map((row) => Object.values(row))

async function login(at) {
  const { host, port, user, password, database } = at
  const seen = []
  for (const options of [{}, { connection: { application_name: 'a name', statement_timeout: 12345, timezone: 'Asia/Tokyo' } }]) {
    const sql = postgres({ host, port, user, password, database, max: 1, ...options })
    seen.push(plain(await sql`SELECT current_user, current_database()`))
    for (const name of ['application_name', 'statement_timeout', 'timezone', 'client_encoding']) {
      seen.push(plain(await sql.unsafe(`SHOW ${name}`)))
    }
    const { application_name, server_encoding, client_encoding, TimeZone, is_superuser } = sql.parameters
    seen.push([application_name, server_encoding, client_encoding, TimeZone, is_superuser])
    await sql.end()
  }
  return seen
}

function values(at) {
  return connected(at, async (sql) => {
    const seen = []
    for (const [type, value] of [
      ['int4', -5], ['int8', '9223372036854775807'], ['float8', 1e300], ['numeric', '1234567890.0987654321'],
      ['bool', true], ['text', 'Zürich 北京 🐘 \' " \\ \n'], ['text', 'x'.repeat(100000)],
      ['bytea', Buffer.from(Array.from({ length: 5000 }, (_, n) => n % 256))],
      ['timestamptz', new Date('2024-02-29T23:59:59.999Z')], ['int4[]', [1, 2, 3]], ['text[]', ['a,b', '"']],
      ['jsonb', { a: [1, 2.5, null, 'ü'] }], ['text', null],
    ]) {
      const found = await sql.unsafe(`SELECT $1::${type} AS v`, [value], { prepare: true })
      assert.deepEqual(found[0].v, value)
      seen.push([plain(found), found.columns.map((column) => [column.name, column.type])])
    }
    seen.push((await sql.unsafe("SELECT 1 AS a; SELECT 'two' AS b")).map(plain))
    seen.push(plain(await sql`SELECT ${'a'}::text, ${[1, 2]}::int[], ${sql.json({ a: 1 })}::json`))
    return seen
  })
}

function transactions(at) {
  return connected(at, async (sql) => {
    await sql`DROP TABLE IF EXISTS tx`
    await sql`CREATE TABLE tx (id int CONSTRAINT one PRIMARY KEY, note text)`
    const seen = []
    await sql.begin('ISOLATION LEVEL SERIALIZABLE', async (tx) => {
      await tx`INSERT INTO tx VALUES (1, ${'kept'})`
      seen.push(await refused(tx.savepoint(async (inner) => {
        await inner`INSERT INTO tx VALUES (2, ${'undone'})`
        await inner`INSERT INTO tx VALUES (1, ${'doubled'})`
      })))
      await tx`INSERT INTO tx ${tx([{ id: 3, note: 'kept' }, { id: 4, note: 'kept' }])}`
    })
    seen.push(await refused(sql.begin(async (tx) => {
      await tx`INSERT INTO tx VALUES (5, ${'undone'})`
      await tx`SELECT 1/${0}::int`
    })))
    const piped = await sql.begin((tx) => [1, 2, 3].map((n) => tx`SELECT ${n}::int AS n`))
    seen.push(piped.map(plain), plain(await sql`SELECT * FROM tx ORDER BY id`))
    assert.equal(seen.at(-1).length, 3)
    return seen
  })
}

function errors(at) {
  return connected(at, async (sql) => [
    await refused(sql`SELEC 1`),
    await refused(sql`SELECT * FROM nowhere WHERE a = ${1}`),
    await refused(sql`SELECT 1/${0}::int`),
    await refused(sql.unsafe('SELECT 1; SELECT 1/0; SELECT 2')),
    await refused(sql`DO $$ BEGIN RAISE 'own' USING ERRCODE = 'AB123', HINT = 'h', DETAIL = 'd'; END $$`),
    plain(await sql`SELECT 'goes on'`),
  ])
}

// Each query is a prepared statement with a name of the client's.
function prepared(at, backends) {
  return connected(at, (sql) => turns(new Set(), backends, async (n) => {
    const [{ pid, v }] = await sql`SELECT pg_backend_pid() AS pid, ${n}::int + 1 AS v`
    assert.equal(v, n + 1)
    const [{ s }] = await sql`SELECT ${'ü' + n}::text AS s`
    assert.equal(s, `ü${n}`)
    return pid
  }))
}

// postgres.js pipelines what is asked at the same time.
function crowd(at) {
  return connected(at, async (sql) => {
    const all = await Promise.all(Array.from({ length: 300 }, (_, n) => sql`SELECT ${n}::int AS v`))
    assert.deepEqual(all.map(([{ v }]) => v), Array.from({ length: 300 }, (_, n) => n))
    await Promise.all(Array.from({ length: 24 }, (_, n) => sql.begin(async (tx) => {
      const [{ v }] = await tx`SELECT ${n}::int * 2 AS v`
      assert.equal(v, 2 * n)
    })))
  }, { max: 12 })
}

function cursors(at) {
  return connected(at, async (sql) => {
    const seen = []
    await sql`SELECT n, n::text || ${'ü'} AS s FROM generate_series(1, 100) n`.cursor(30, (part) => { seen.push(plain(part)) })
    assert.equal(seen.length, 4)
    for await (const part of sql`SELECT generate_series(1, 1000000)`.cursor(5)) {
      seen.push(plain(part))
      break
    }
    await sql`SELECT generate_series(1, 20) AS n`.forEach((row) => { seen.push(row.n) })
    seen.push((await sql`SELECT ${1}::int AS n, 'b' AS b`.describe()).columns.map(({ name, type }) => [name, type]))
    return seen
  })
}

function copies(at) {
  return connected(at, async (sql) => {
    await sql`DROP TABLE IF EXISTS copied`
    await sql`CREATE TABLE copied (id int PRIMARY KEY, note text)`
    // Few: past its stream's buffer, postgres.js waits for ever, on a direct connection, too.
    const lines = Array.from({ length: 500 }, (_, n) => `${n}\tü${n}\n`)
    await pipeline(Readable.from(lines), await sql`COPY copied FROM STDIN`.writable())
    let text = ''
    for await (const chunk of await sql`COPY (SELECT * FROM copied ORDER BY id) TO STDOUT`.readable()) text += chunk
    assert.equal(text, lines.join(''))
    return plain(await sql`SELECT count(*) FROM copied`)
  })
}

function listens(at) {
  return connected(at, async (sql) => {
    const heard = []
    const { unlisten } = await sql.listen('kanal', (payload) => heard.push(payload))
    for (const n of [1, 2, 3]) await sql.notify('kanal', `payload ${n}`)
    await until(() => heard.length === 3, 'three notifications')
    await unlisten()
    return heard
  })
}

function settings(at) {
  return connected(at, async (sql) => {
    const shown = async () => plain(await sql`SELECT current_setting('search_path'), current_setting('timezone')`)
    await sql`SET search_path = pg_catalog`
    await sql`SET timezone = 'Asia/Tokyo'`
    const seen = []
    for (let n = 0; n < 5; n++) seen.push(await shown())
    await sql`RESET ALL`
    return [...seen, await shown()]
  })
}

function cancels(at, backends) {
  return connected(at, async (sql) => {
    const query = sql`SELECT pg_sleep(33)`
    const ended = refused(query)
    await connected(place.direct, async (look) => {
      await until(async () => (await look`SELECT FROM pg_stat_activity WHERE state = 'active'
        AND query = 'SELECT pg_sleep(33)' AND datname = current_database()`).count, 'the query runs')
      query.cancel()
    })
    const { code, message } = await ended
    return [code, message, plain(await afterCancel(backends, () => sql`SELECT ${1}::int`))]
  })
}

// Anew: after the end of a connection amid a query, postgres.js itself fails the next one, and it
// may crash amid a transaction, on a direct connection, too.
async function reconnects(at) {
  await connected(at, (sql) => refused(sql`SELECT pg_terminate_backend(pg_backend_pid())`))
  return connected(at, async (again) => plain(await again`SELECT 'again'`))
}

await run([
  login, values, transactions, errors, prepared, crowd, cursors, copies, listens, settings, cancels, reconnects,
])
