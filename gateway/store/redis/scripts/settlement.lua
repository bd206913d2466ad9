-- What settle and cancel share; their KEYS and plan are those of admit.
-- include: limits
local function bury(key, now)
  call('SET', key, cmsgpack.pack({now + TOMBSTONE_US}), 'PX', TOMBSTONE_US / 1000 + 1000)
end

local function settle_scope(rule, how, state, reserved, used, now)
  local rates, budgets = rule[1], rule[3]
  for r = 1, #rates, 5 do
    local unit, per_minute = rates[r] + 1, rates[r + 1]
    if how == '1' and reserved[unit] ~= used[unit] then
      local mark = math.max(state[unit], now)
      mark = mark + (charge_us(used[unit], per_minute) - charge_us(reserved[unit], per_minute))
      state[unit] = math.max(mark, now)
    end
  end
  if rule[5] > 0 then
    local key = KEYS[rule[5]]
    drop_all_expired(state, key, now)
    if state[FIRST] < NEVER and call('ZREM', key, ARGV[1]) == 1 then
      state[RESERVED] = math.max(state[RESERVED] - reserved[5], 0)
    end
    add_spend(state, budgets, used[5], now)
  end
end

-- 1 when there was an admission to settle, 0 when there was none, -1 when it is settled already.
local function settle(reserved, used, plan, now)
  local values = call('MGET', unpack(KEYS, 1, #plan + 1))
  if not values[1] then return 0 end
  local record = cmsgpack.unpack(values[1])
  if record[1] <= now then return 0 end
  if not record[2] then return -1 end
  for scope, rule in ipairs(plan) do
    local how = string.sub(record[2], scope, scope)
    if how ~= '0' then
      local state = state_of(values[scope + 1])
      settle_scope(rule, how, state, reserved, used, now)
      save(KEYS[scope + 1], state, now)
    end
  end
  bury(KEYS[1], now)
  return 1
end
