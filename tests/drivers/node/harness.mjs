// Runs checks against the server directly and through the sidecar, and prints what they found.

import assert from 'node:assert/strict'

export const place = JSON.parse(process.argv[2])

const PATIENCE = 15_000 // milliseconds for one check

// What a driver says of an error, without what only it knows.
export function told(error) {
  const { code, severity, message, detail, hint, position, constraint, constraint_name } = error
  const at = position === undefined ? undefined : Number(position)
  return { code, severity, message, detail, hint, at, constraint: constraint ?? constraint_name }
}

export async function refused(promise) {
  try {
    await promise
  } catch (error) {
    return told(error)
  }
  assert.fail('it was not refused')
}

// Numbers for transactions until these have run on as many backends as are to be seen.
export async function turns(pids, backends, transaction) {
  for (let turn = 0; turn < 1000 && (turn < 50 || pids.size < backends); turn++) {
    pids.add(await transaction(turn))
  }
  assert(backends === 1 ? pids.size === 1 : pids.size >= backends, `${pids.size} backends`)
}

export async function until(look, what) {
  const deadline = Date.now() + 10_000
  while (!(await look())) {
    assert(Date.now() < deadline, `not within 10 s: ${what}`)
    await new Promise((done) => setTimeout(done, 10))
  }
}

// What the client is answered after one of its queries was cancelled. PostgreSQL before 17 signals
// twice for one request, to the backend and to its process group, and the second signal may hit the
// next query of the same client, which is asked again. Not where the pool chooses the connection.
export async function afterCancel(backends, ask) {
  try {
    return await ask()
  } catch (error) {
    if (backends !== 1 || error.code !== '57014') throw error
    return ask()
  }
}

function shown(key, value) {
  if (typeof value === 'bigint') return String(value)
  if (typeof value === 'number' && !Number.isFinite(value)) return String(value)
  return value
}

async function tried(check, at, backends) {
  let timer
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Error('it takes too long')), PATIENCE)
  })
  try {
    return (await Promise.race([check(at, backends), late])) ?? 'done'
  } catch (error) {
    return { failed: String(error.stack ?? error) }
  } finally {
    clearTimeout(timer)
  }
}

export async function run(checks) {
  const found = { direct: {}, through: {} }
  for (const check of checks) {
    found.direct[check.name] = await tried(check, place.direct, 1)
    found.through[check.name] = await tried(check, place.through, place.backends)
  }
  process.stdout.write(JSON.stringify(found, shown) + '\n', () => process.exit(0))
}
