-- Limits.admit. KEYS: the request's record, each scope's state, the leases of the scopes that have some.
-- ARGV: lease member (`<id>`, a line end, the micros), lease in microseconds, cost, plan. Cost and plan are MessagePack; the plan has for each scope:
-- {rates {unit, per minute, burst, burst in microseconds, largest, ...}, concurrent or -1,
--  budgets {kind, period, limit, floor, end, ...} or false, shadow 0 or 1, position of its leases in KEYS or 0}.
-- Answers {admitted, now, marks, in use, spent, {scope, limit, wait, shadow}, ...}.
-- include: limits
local NAMES = {'requests', 'input', 'output', 'total'}

local now = clock()
local cost = cmsgpack.unpack(ARGV[3])
local plan = cmsgpack.unpack(ARGV[4])
local values = call('MGET', unpack(KEYS, 1, #plan + 1))
local look -- not nil for a request that was here before: the answer is how things are, nothing is charged
if values[1] then
  local record = cmsgpack.unpack(values[1])
  if record[1] > now then
    if record[3] then return record[3] end
    look = record[2] and 1 or 0
    cost = {0, 0, 0, 0, 0}
  end
end
local micros = cost[5]
local states, marks, charges, in_use, spent = {}, {}, {}, {}, {}
local answer = {1, now, marks, in_use, spent}
local charged = {}

local function refuse(scope, limit, wait)
  local shadow = plan[scope][4]
  answer[#answer + 1] = {scope - 1, limit, wait, shadow}
  charged[scope] = 0
  if shadow == 0 then answer[1] = 0 end
end

local function judge_rates(scope, rates, state)
  for r = 1, #rates, 5 do
    local unit, burst, burst_us, largest = rates[r] + 1, rates[r + 2], rates[r + 3], rates[r + 4]
    local units = cost[unit]
    local mark = state[unit]
    if mark < now then mark = now end
    local charge = charge_us(units, rates[r + 1])
    marks[#marks + 1] = mark
    charges[#charges + 1] = charge
    local wait = mark - now
    if units <= burst and charge < burst_us then wait = wait - (burst_us - charge) end
    if units > largest then
      refuse(scope, NAMES[unit], -1)
    elseif units > 0 and wait > 0 then
      refuse(scope, NAMES[unit], wait)
    end
  end
end

local function live_lease(key, position)
  local found = call('ZRANGEBYSCORE', key, string.format('(%.0f', now), '+inf', 'WITHSCORES', 'LIMIT', position, 1)
  return found[2] and found[2] - now or -1
end

local function judge_concurrency(scope, concurrent, state, key)
  local live = 0
  if state[FIRST] > now then
    if state[FIRST] < NEVER then live = call('ZCARD', key) end
  else
    live = call('ZCOUNT', key, string.format('(%.0f', now), '+inf')
  end
  in_use[#in_use + 1] = live
  if live >= concurrent then
    refuse(scope, 'concurrent', concurrent > 0 and live_lease(key, live - concurrent) or -1)
  end
end

local function judge_money(scope, budgets, state, key)
  local already = {}
  for r = 1, #budgets, 5 do
    local _, count = budget(state, budgets, r, now)
    already[#already + 1] = count
    local room = budgets[r + 2] - count - micros
    while micros > 0 and room >= 0 and room < state[RESERVED] and state[FIRST] <= now do
      prune(state, key, now)
    end
    if micros > 0 and room < state[RESERVED] then
      refuse(scope, budgets[r + 1], room < 0 and -1 or live_lease(key, 0))
    end
  end
  for _, count in ipairs(already) do
    spent[#spent + 1] = count + state[RESERVED]
  end
end

for scope, rule in ipairs(plan) do
  local state = state_of(values[scope + 1])
  states[scope] = state
  charged[scope] = 1
  judge_rates(scope, rule[1], state)
  if rule[5] > 0 then
    local key = KEYS[rule[5]]
    drop_all_expired(state, key, now)
    if state[FIRST] <= now then prune(state, key, now) end
    if rule[2] >= 0 then judge_concurrency(scope, rule[2], state, key) end
    if rule[3] then judge_money(scope, rule[3], state, key) end
  end
end
if look or answer[1] == 0 then
  for scope, rule in ipairs(plan) do
    if values[scope + 1] and dropped[KEYS[rule[5]]] then save(KEYS[scope + 1], states[scope], now) end
  end
  return look and {look, now, marks, in_use, spent} or answer
end

local runs_out = now + ARGV[2]
local rate, used, sum = 0, 0, 0
for scope, rule in ipairs(plan) do
  local how, state, rates, budgets = charged[scope], states[scope], rule[1], rule[3]
  for r = 1, #rates, 5 do
    rate = rate + 1
    if how == 1 then
      marks[rate] = marks[rate] + charges[rate]
      state[rates[r] + 1] = marks[rate]
    end
  end
  if rule[5] > 0 then
    if how == 1 then
      hold(state, KEYS[rule[5]], ARGV[1], micros, runs_out, now)
      add_spend(state, budgets, 0, now)
    end
    if rule[2] >= 0 then
      used = used + 1
      in_use[used] = in_use[used] + how
    end
    for _ = 1, budgets and #budgets or 0, 5 do
      sum = sum + 1
      if how == 1 then spent[sum] = spent[sum] + micros end
    end
  end
  save(KEYS[scope + 1], state, now)
end
local record = cmsgpack.pack({now + RECORD_US, table.concat(charged), answer})
call('SET', KEYS[1], record, 'PX', RECORD_US / 1000 + MARGIN_MS)
return answer
