-- What the scripts of the queue share. The rules are those of gateway/store/line.py, number for number; why they are
-- as they are is told there.
--
-- KEYS, all of one pool: its state, one MessagePack array (`s`, see below); `held`, id to ticket; `ends`, ids by the time
-- their place runs out; `queued`, id to entry; `line`, all entries `tenant NUL band NUL number NUL ticket` in
-- lexicographic order, so that a range is a tenant's queue; `siblings`, `gateway NUL number NUL id`; `seen`, gateways by
-- their last sign of life; two generations of ids that have left; four `heads`, `number tenant` by start tag, and four
-- `finish`, tenants by finish tag. A ticket is a MessagePack array; of a place, [7] is what it really takes and [8] is 1
-- until its gateway has confirmed it.
local STATE, HELD, ENDS, QUEUED, LINE, SIBLINGS, SEEN, GONE, GONE_BEFORE =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local HEADS = {KEYS[10], KEYS[11], KEYS[12], KEYS[13]}
local FINISH = {KEYS[14], KEYS[15], KEYS[16], KEYS[17]}
-- Positions in the state: first of each band (band + ...), then of the pool.
local VIRTUAL, TURN, RUNNING, TOKENS, WAITING = 0, 4, 8, 12, 16
local PASSED = 28
local NUMBER, GRANTS, INTERVAL, RELEASED, MEASURED, GONE_SINCE, GONE_COUNT, NEXT_END = 21, 22, 23, 24, 25, 26, 27, 28
local TIDIED = 33
-- Positions in a ticket and a room.
local ID, GATEWAY, TENANT, WEIGHT, BAND, COST, KV, MAX_WAIT, UNCONFIRMED = 1, 2, 3, 4, 5, 6, 7, 8, 8
local PLACES, LIMIT, SHARES, MAX_WAITING, MAX_PER_TENANT, LEASE, GRANT, SILENCE = 1, 2, 3, 4, 5, 6, 7, 8
local UNITS, MAX_CHARGE, TURN_UNITS = 1000, 1099511627776, 1000000
local TRIM_EVERY, REBASE_AT, BATCH = 1024, 2251799813685248, 64
local REMEMBER, MAX_GONE, STALE, NEVER = 60000000, 65536, 300000000, 9007199254740992
local REMEMBER_MS = '180000' -- a generation that nobody turns over ends by itself
local TIDY_EVERY = 3600000000
-- A day and an hour, from when a key is made or tidied on: longer than any request, and then a pool that nobody uses any
-- more is gone. Who uses it leaves places and renews them, which tidies. A key that ran empty is another when it is written to again.
local KEEP_MS = '90000000'

local call, pack, unpack_ = redis.call, cmsgpack.pack, cmsgpack.unpack
local floor, max, min = math.floor, math.max, math.min

local function whole(number)
  return string.format('%.0f', number)
end

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local told = {} -- {gateway, id} of those granted in this call
local s

local function sum(first)
  return s[first + 1] + s[first + 2] + s[first + 3] + s[first + 4]
end

-- What only matters while somebody waits. `open_queue` defines these: making a function takes Redis about a third of a
-- microsecond, and most requests never wait.
local number_of, ticket_of, range_of, first_entry, put_in, take_out, bury, first_of, before, shares_of, choose,
  dispatch, publish
local open_queue

local function heads_are_there()
  local waiting = {}
  for band = 1, 4 do
    if s[WAITING + band] > 0 then waiting[#waiting + 1] = HEADS[band] end
  end
  return call('EXISTS', unpack(waiting)) == #waiting
end

-- Redis may have dropped one of the keys (eviction) and not the others: then everybody asks anew, and what runs is put
-- back by its gateway's next renewal.
local function open_state()
  local text = call('GET', STATE)
  if text then
    s = unpack_(text)
    local running, waiting = sum(RUNNING), sum(WAITING)
    if call('ZCARD', ENDS) == running and call('HLEN', HELD) == running and call('HLEN', QUEUED) == waiting
      and call('ZCARD', LINE) == waiting and (waiting == 0 or heads_are_there()) then
      if waiting > 0 then open_queue() end
      return
    end
  end
  call('UNLINK', HELD, ENDS, QUEUED, LINE, SIBLINGS, unpack(KEYS, 10, 17))
  s = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, NEVER, 0, 0, 0, 0, 0}
end

local function save()
  call('SET', STATE, pack(s), 'PX', KEEP_MS)
end

local function see(gateway)
  if call('ZADD', SEEN, whole(now), gateway) == 1 then call('PEXPIRE', SEEN, KEEP_MS) end
end

local function set_finish(band, tenant, finish)
  if call('ZADD', FINISH[band], whole(finish), tenant) == 1 then call('PEXPIRE', FINISH[band], KEEP_MS) end
end

local function tidy()
  if now - (s[TIDIED] or 0) < TIDY_EVERY then return end
  s[TIDIED] = now
  for i = 2, #KEYS do
    if i ~= 8 and i ~= 9 then call('PEXPIRE', KEYS[i], KEEP_MS) end
  end
  if sum(WAITING) == 0 then call('ZREMRANGEBYSCORE', SEEN, '-inf', '(' .. whole(now - TIDY_EVERY)) end
end

local function charge(cost, weight)
  return max(1, min(MAX_CHARGE, floor(cost * UNITS / weight)))
end

local function start_of(band, tenant)
  return max(tonumber(call('ZSCORE', FINISH[band], tenant) or 0), s[VIRTUAL + band])
end

local function reset_if_empty(band)
  if s[RUNNING + band] == 0 and s[WAITING + band] == 0 then
    s[VIRTUAL + band] = 0
    call('UNLINK', FINISH[band])
  end
end

local function correct(band, tenant, by)
  local finish = tonumber(call('ZSCORE', FINISH[band], tenant))
  if not finish then
    if by <= 0 then return end
    finish = s[VIRTUAL + band]
  end
  local corrected = finish + by
  set_finish(band, tenant, corrected)
  local entry = s[WAITING + band] > 0 and first_entry(tenant, band)
  if entry then
    local head = number_of(entry) .. tenant
    local start = tonumber(call('ZSCORE', HEADS[band], head))
    call('ZADD', HEADS[band], whole(start == finish and corrected or max(start, corrected)), head)
  end
end

local function trim(band)
  local virtual = s[VIRTUAL + band]
  call('ZREMRANGEBYSCORE', FINISH[band], '-inf', whole(virtual))
  if virtual > REBASE_AT then
    local heads = call('ZRANGE', HEADS[band], 0, -1, 'WITHSCORES')
    for i = 1, #heads, 2 do
      call('ZADD', HEADS[band], whole(max(0, heads[i + 1] - virtual)), heads[i])
    end
    call('UNLINK', FINISH[band])
    s[VIRTUAL + band] = 0
  end
end

local function hold(ticket, tokens, ends, unconfirmed)
  local band, first = ticket[BAND] + 1, sum(RUNNING) == 0
  s[RUNNING + band] = s[RUNNING + band] + 1
  s[TOKENS + band] = s[TOKENS + band] + tokens
  ticket[KV], ticket[UNCONFIRMED] = tokens, unconfirmed
  call('HSET', HELD, ticket[ID], pack(ticket))
  call('ZADD', ENDS, whole(ends), ticket[ID])
  if first then
    call('PEXPIRE', HELD, KEEP_MS)
    call('PEXPIRE', ENDS, KEEP_MS)
  end
  s[NEXT_END] = min(s[NEXT_END], ends)
end

local function grant(ticket, tokens, start, ends, unconfirmed)
  local band = ticket[BAND] + 1
  s[VIRTUAL + band] = start
  set_finish(band, ticket[TENANT], start + charge(ticket[COST], ticket[WEIGHT]))
  hold(ticket, tokens, ends, unconfirmed)
  s[GRANTS] = s[GRANTS] + 1
  if s[GRANTS] % TRIM_EVERY == 0 then
    for each = 1, 4 do trim(each) end
  end
end

-- Give back what `ticket` of `held` takes; `used` is its real cost, nil as estimated.
local function give_back(ticket, used)
  local band = ticket[BAND] + 1
  call('HDEL', HELD, ticket[ID])
  call('ZREM', ENDS, ticket[ID])
  s[RUNNING + band] = s[RUNNING + band] - 1
  s[TOKENS + band] = s[TOKENS + band] - ticket[KV]
  if used and used ~= ticket[COST] then
    correct(band, ticket[TENANT], charge(used, ticket[WEIGHT]) - charge(ticket[COST], ticket[WEIGHT]))
  end
  reset_if_empty(band)
end

local function expire()
  if now < s[NEXT_END] then return end
  for _, id in ipairs(call('ZRANGEBYSCORE', ENDS, '-inf', whole(now), 'LIMIT', 0, BATCH)) do
    local ticket = unpack_(call('HGET', HELD, id))
    give_back(ticket, ticket[UNCONFIRMED] == 1 and 0 or nil)
  end
  s[NEXT_END] = tonumber(call('ZRANGE', ENDS, 0, 0, 'WITHSCORES')[2] or NEVER)
end

function open_queue()
  function number_of(entry)
    local at = string.find(entry, '\0', 1, true)
    return string.sub(entry, at + 3, at + 18)
  end

  function ticket_of(entry)
    return unpack_(string.sub(entry, string.find(entry, '\0', 1, true) + 20))
  end

  function range_of(tenant, band)
    local name = tenant .. '\0' .. (band - 1)
    return '[' .. name .. '\0', '(' .. name .. '\1'
  end

  function first_entry(tenant, band)
    local from, to = range_of(tenant, band)
    return call('ZRANGEBYLEX', LINE, from, to, 'LIMIT', 0, 1)[1]
  end

  function put_in(ticket)
    local band, tenant = ticket[BAND] + 1, ticket[TENANT]
    s[NUMBER] = s[NUMBER] + 1
    local number = string.format('%016.0f', s[NUMBER])
    if s[WAITING + band] == 0 then
      local turn = NEVER
      for other = 1, 4 do
        if s[WAITING + other] > 0 then turn = min(turn, s[TURN + other]) end
      end
      if turn < NEVER then s[TURN + band] = max(s[TURN + band], turn) end
    end
    if s[WAITING + band] == 0 or not first_entry(tenant, band) then
      call('ZADD', HEADS[band], whole(start_of(band, tenant)), number .. tenant)
      if s[WAITING + band] == 0 then call('PEXPIRE', HEADS[band], KEEP_MS) end
    end
    local entry = table.concat({tenant, band - 1, number, pack(ticket)}, '\0')
    call('ZADD', LINE, 0, entry)
    call('HSET', QUEUED, ticket[ID], entry)
    call('ZADD', SIBLINGS, 0, ticket[GATEWAY] .. '\0' .. number .. '\0' .. ticket[ID])
    if sum(WAITING) == 0 then
      for i = 4, 6 do call('PEXPIRE', KEYS[i], KEEP_MS) end
    end
    s[WAITING + band] = s[WAITING + band] + 1
    return entry
  end

  function take_out(entry, ticket, granted)
    local band, tenant, number = ticket[BAND] + 1, ticket[TENANT], number_of(entry)
    local head = number .. tenant
    call('ZREM', LINE, entry)
    call('HDEL', QUEUED, ticket[ID])
    call('ZREM', SIBLINGS, ticket[GATEWAY] .. '\0' .. number .. '\0' .. ticket[ID])
    local start = call('ZSCORE', HEADS[band], head)
    if start then
      local successor = first_entry(tenant, band)
      if successor then
        if granted then start = whole(start_of(band, tenant)) end
        call('ZADD', HEADS[band], start, number_of(successor) .. tenant)
      end
      call('ZREM', HEADS[band], head) -- last: the key must not run empty in between
    end
    s[WAITING + band] = s[WAITING + band] - 1
    if sum(WAITING) == 0 then
      for each = 1, 4 do s[TURN + each] = 0 end
    end
    if s[WAITING + band] == 0 then s[PASSED + band] = 0 end
    reset_if_empty(band)
  end

  function bury(room)
    local gateway = call('ZRANGEBYSCORE', SEEN, '-inf', '(' .. whole(now - room[SILENCE]), 'LIMIT', 0, 1)[1]
    if not gateway then return end
    local from, to = '[' .. gateway .. '\0', '(' .. gateway .. '\1'
    for _, sibling in ipairs(call('ZRANGEBYLEX', SIBLINGS, from, to, 'LIMIT', 0, BATCH)) do
      local entry = call('HGET', QUEUED, string.sub(sibling, #gateway + 19))
      take_out(entry, ticket_of(entry), false)
    end
    if #call('ZRANGEBYLEX', SIBLINGS, from, to, 'LIMIT', 0, 1) == 0 then call('ZREM', SEEN, gateway) end
  end

  -- The first request of a band, its entry and its start tag; those of dead gateways before it are dropped.
  function first_of(band, room)
    while s[WAITING + band] > 0 do
      local head = call('ZRANGE', HEADS[band], 0, 0, 'WITHSCORES')
      local entry = first_entry(string.sub(head[1], 17), band)
      local ticket = ticket_of(entry)
      local seen = call('ZSCORE', SEEN, ticket[GATEWAY])
      if seen and now - seen <= room[SILENCE] then return ticket, entry, tonumber(head[2]) end
      take_out(entry, ticket, false)
    end
  end

  -- Whether a choice {class, use, turn, band, ...} comes before another.
  function before(a, b)
    for i = 1, 4 do
      if a[i] ~= b[i] then return a[i] < b[i] end
    end
    return false
  end

  function shares_of(room)
    local shares, total = {}, 0
    for band = 1, 4 do
      shares[band] = max(1, room[SHARES][band])
      total = total + room[SHARES][band]
    end
    return shares, max(100, total)
  end

  function choose(room)
    local shares, total = shares_of(room)
    local places, limit, taken = room[PLACES], room[LIMIT], sum(TOKENS)
    local fitting, blocked, starved = {}, {NEVER, 0}, {NEVER, 0}
    for band = 1, 4 do
      local ticket, entry, start = first_of(band, room)
      if ticket then
        local tokens, step = ticket[KV], floor(TURN_UNITS / places)
        if limit then
          tokens = min(tokens, limit)
          step = max(step, floor(tokens / limit * TURN_UNITS))
        end
        step = max(1, floor(step / shares[band]))
        if not limit or taken + tokens <= limit then
          fitting[#fitting + 1] = {0, 0, s[TURN + band], band, ticket, entry, start, tokens, step}
        else
          if s[TURN + band] < blocked[1] then blocked = {s[TURN + band], band} end
        end
        if s[RUNNING + band] == 0 and s[PASSED + band] >= TURN_UNITS / shares[band] and s[TURN + band] < starved[1] then
          starved = {s[TURN + band], band}
        end
      end
    end
    local best
    for _, choice in ipairs(fitting) do
      local turn, band = choice[3], choice[4]
      local share = room[SHARES][band]
      local within = (s[RUNNING + band] + 1) * total <= share * places
      local use = s[RUNNING + band] / places
      if limit then
        within = within and (s[TOKENS + band] + choice[8]) * total <= share * limit
        use = max(use, s[TOKENS + band] / limit)
      end
      local allowed = starved[2] == 0 or starved[2] == band
      choice[10] = within
      if within then
        choice[2] = use / shares[band]
      elseif starved[2] ~= 0 or turn < blocked[1] or (turn == blocked[1] and band < blocked[2]) then
        choice[1] = 1
      else
        allowed = false
      end
      if allowed and (not best or before(choice, best)) then best = choice end
    end
    return best
  end

  function dispatch(room)
    if room[LIMIT] and room[LIMIT] <= 0 then return end
    while sum(WAITING) > 0 and sum(RUNNING) < room[PLACES] do
      local best = choose(room)
      if not best then return end
      local band, ticket = best[4], best[5]
      s[TURN + band] = s[TURN + band] + best[9]
      for other = 1, 4 do
        if best[10] and other ~= band and s[WAITING + other] > 0 and s[RUNNING + other] == 0 then
          s[PASSED + other] = s[PASSED + other] + best[9]
        end
      end
      s[PASSED + band] = 0
      grant(ticket, best[8], best[7], now + room[GRANT], 1)
      take_out(best[6], ticket, true)
      told[#told + 1] = {ticket[GATEWAY], ticket[ID]}
    end
  end

  -- Tell gateways what was granted, unless `answered(gateway, id)`: the answer of this call does.
  function publish(prefix, pool, answered)
    for _, each in ipairs(told) do
      if not answered(each[1], each[2]) then
        call('PUBLISH', prefix .. ':granted:' .. each[1], pool .. '\n' .. each[2])
      end
    end
  end
end

local function interval()
  if s[INTERVAL] == 0 then return 0 end
  if s[RELEASED] == 0 then
    return now - s[MEASURED] > STALE and 0 or s[INTERVAL]
  end
  return max(s[INTERVAL], floor((now - s[RELEASED]) / 4))
end

local function turn_over()
  call('UNLINK', GONE_BEFORE)
  if s[GONE_COUNT] > 0 then
    if now - s[GONE_SINCE] < 2 * REMEMBER then
      if call('EXISTS', GONE) == 1 then call('RENAME', GONE, GONE_BEFORE) end
    else
      call('UNLINK', GONE)
    end
  end
  s[GONE_SINCE], s[GONE_COUNT] = now, 0
end

local function in_generations(id)
  return call('SISMEMBER', GONE, id) == 1 or call('SISMEMBER', GONE_BEFORE, id) == 1
end

local function has_left(id)
  if not in_generations(id) then return false end
  if now - s[GONE_SINCE] < REMEMBER then return true end
  turn_over()
  return in_generations(id)
end
