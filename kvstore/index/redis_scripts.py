"""The index's form in Redis, and the scripts that change it.

For each node, under `PREFIX:{NODE}` (the braces keep a node's keys in one slot of a cluster):

    :meta               hash   incarnation (20 digits, so that strings sort as numbers), sequence, token
    :sections           set    names of its sections: TIER.FINGERPRINT_HEX
    :INCARNATION:NAME   set    the 16-byte keys of one section
    :stage:TOKEN:NAME   set    a section being published

All of a node's keys live as long as its lease. Scripts make each change whole and ordered: several routers write the
same events, and one that lags must not undo what is newer. A script answers the sequence that it leaves the node at,
UNKNOWN when Redis lacks something (flushed, expired, a gap): publish in full; or OLDER when it knows a newer life.
(Lua's `unpack` takes some 8,000 values at most; so 1,000 keys a call.)
"""

from __future__ import annotations

UNKNOWN = -1
OLDER = -2

_PRELUDE = """
local base, life, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local meta, names = base .. ':meta', base .. ':sections'
local known = redis.call('HGET', meta, 'incarnation')
local function set(name) return base .. ':' .. life .. ':' .. name end
local function keep()
  redis.call('PEXPIRE', meta, ttl); redis.call('PEXPIRE', names, ttl)
  for _, name in ipairs(redis.call('SMEMBERS', names)) do redis.call('PEXPIRE', set(name), ttl) end
end
local function wipe(life_known)
  for _, name in ipairs(redis.call('SMEMBERS', names)) do
    redis.call('UNLINK', base .. ':' .. life_known .. ':' .. name)
  end
  redis.call('DEL', names, meta)
end
"""

_KNOWN_LIFE_ONLY = """
if not known or known < life then return -1 end
if known > life then return -2 end
local at = tonumber(redis.call('HGET', meta, 'sequence'))
"""

APPLY = (
    _PRELUDE
    + _KNOWN_LIFE_ONLY
    + """
local function change(command, name, packed)
  for first = 1, #packed, 16000 do
    local keys = {}
    for at = first, math.min(first + 15999, #packed), 16 do keys[#keys + 1] = string.sub(packed, at, at + 15) end
    redis.call(command, set(name), unpack(keys))
  end
end
local function clear(tier)
  for _, name in ipairs(redis.call('SMEMBERS', names)) do
    if string.sub(name, 1, #tier + 1) == tier .. '.' then
      redis.call('UNLINK', set(name)); redis.call('SREM', names, name)
    end
  end
end
for i = 4, #ARGV, 4 do
  local number, kind, name, keys = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if number > at + 1 then at = -1; break end
  if number == at + 1 then
    if kind == '1' then redis.call('SADD', names, name); change('SADD', name, keys)
    elseif kind == '2' then change('SREM', name, keys)
    else clear(name) end
    at = number
    redis.call('HSET', meta, 'sequence', at)
  end
end
keep()
return at
"""
)
"""ARGV: base, incarnation, ttl in ms; then for each event number, kind, section (CLEARED: tier), packed keys."""

RENEW = _PRELUDE + _KNOWN_LIFE_ONLY + "keep()\nreturn at\n"
"""ARGV: base, incarnation, ttl in ms."""

COMMIT = (
    _PRELUDE
    + """
local token, sequence = ARGV[4], tonumber(ARGV[5])
local function staged(name) return base .. ':stage:' .. token .. ':' .. name end
local at = tonumber(redis.call('HGET', meta, 'sequence') or -1)
if known and (known > life or (known == life and at >= sequence)) then
  for i = 6, #ARGV do redis.call('UNLINK', staged(ARGV[i])) end
  if known > life then return -2 end
  keep()
  return at
end
for i = 6, #ARGV do if redis.call('EXISTS', staged(ARGV[i])) == 0 then return -1 end end
if known then wipe(known) end
redis.call('HSET', meta, 'incarnation', life, 'sequence', sequence, 'token', token)
for i = 6, #ARGV do
  redis.call('RENAME', staged(ARGV[i]), set(ARGV[i])); redis.call('SADD', names, ARGV[i])
end
keep()
return sequence
"""
)
"""A full copy takes the place of what was there, unless that is as new. ARGV: base, incarnation, ttl in ms, token,
sequence, sections.."""

FORGET = _PRELUDE + "if known == life then wipe(life) end\nreturn 0\n"
"""The node said goodbye. ARGV: base, incarnation, ttl in ms."""
