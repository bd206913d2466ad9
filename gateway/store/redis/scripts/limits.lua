-- What the scripts of the limiter share. The rules are those of gateway/store/memory_limits.py, number for number.
--
-- A scope's state is one MessagePack array: the marks of requests, input, output and total, the money that leases
-- reserve, a time before which no lease runs out, the time at which the last one has, and for each kind of budget its
-- period, what was spent, and its end. Its leases are a sorted set of `<id>\n<micros>` by the time they run out.
-- A request's record is {until, charged, answer}, one character of `charged` for each scope; {until, charged} when a
-- renewal has put it back; {until} when it is settled or cancelled.
--
-- Numbers that go to Redis as arguments are whole and below 2^53. `redis.call` writes those with up to 17 digits, unlike
-- Lua's own conversion, which has 14; where a number becomes part of a text, `string.format` makes it.
local PRUNE = 64
local RECORD_US = 25 * 3600 * 1000000
local TOMBSTONE_US = 60000000
local UNNAMED_END_US = 40 * 86400 * 1000000
local MARGIN_MS = 60000 -- by which keys outlive what is in them, lest a clock that is set back bring it to life
local NEVER = 9007199254740991
local dropped = {} -- states, by the key of their leases, that have changed even if nothing is charged
local RESERVED, FIRST, LAST, BUDGETS = 5, 6, 7, 8

local call = redis.call

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- FIRST of 0 says that nobody knows: Redis may have dropped the state and not the leases.
local function state_of(text)
  return text and cmsgpack.unpack(text) or {0, 0, 0, 0, 0, 0, 0}
end

local function save(key, state, now)
  local last = math.max(now, state[1], state[2], state[3], state[4], state[LAST])
  for at = BUDGETS, #state, 3 do
    if state[at + 2] > last then last = state[at + 2] end
  end
  call('SET', key, cmsgpack.pack(state), 'PX', math.ceil((last - now) / 1000) + MARGIN_MS)
end

local function charge_us(units, per_minute)
  return math.ceil(units * 60000000 / per_minute)
end

-- Drops up to PRUNE leases that have run out.
local function prune(state, key, now)
  local gone = call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, PRUNE)
  if #gone > 0 then
    for _, member in ipairs(gone) do
      state[RESERVED] = math.max(state[RESERVED] - string.match(member, '\n(%d+)$'), 0)
    end
    call('ZREMRANGEBYRANK', key, 0, #gone - 1)
  end
  dropped[key] = true
  if #gone < PRUNE then
    state[FIRST] = tonumber(call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]) or NEVER
  end
end

-- Forgets every lease, if the last of them has run out.
local function drop_all_expired(state, key, now)
  if state[LAST] > 0 and state[LAST] <= now then
    call('UNLINK', key)
    dropped[key] = true
    state[RESERVED], state[FIRST], state[LAST] = 0, NEVER, 0
  end
end

-- Starts a lease, or lets the one that there is run until then.
local function hold(state, key, member, micros, runs_out, now)
  if call('ZADD', key, runs_out, member) == 1 then
    state[RESERVED] = state[RESERVED] + micros
  end
  if runs_out < state[FIRST] then state[FIRST] = runs_out end
  if runs_out > state[LAST] then state[LAST] = runs_out end
  call('PEXPIRE', key, math.ceil((state[LAST] - now) / 1000) + MARGIN_MS)
end

-- The budget in `rule` that starts at `r` (kind, period, limit, floor, end): the period in force, what was spent in
-- it, its end, and where it stands in the state.
local function budget(state, rule, r, now)
  local kind, period, floor, ends = rule[r], rule[r + 1], rule[r + 3], rule[r + 4]
  if ends == 0 then ends = now + UNNAMED_END_US end
  local at = BUDGETS
  while state[at] and string.sub(state[at], 1, 1) ~= kind do at = at + 3 end
  if state[at] and state[at + 2] > now then
    if state[at] > period then return state[at], state[at + 1], state[at + 2], at end
    if state[at] == period then return period, math.max(state[at + 1], floor), state[at + 2], at end
  end
  return period, floor, ends, at
end

local function add_spend(state, rule, micros, now)
  for r = 1, rule and #rule or 0, 5 do
    local period, spent, ends, at = budget(state, rule, r, now)
    state[at], state[at + 1], state[at + 2] = period, spent + micros, ends
  end
end
