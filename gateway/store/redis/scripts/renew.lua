-- Limits.renew. KEYS: for each reservation those of admit, one after the other.
-- ARGV: lease in microseconds, then for each: lease member, reserved micros, plan (its positions of leases count from its own
-- first key). Answers 1.
-- include: limits
local now = clock()
local runs_out = now + ARGV[1]
local states = {} -- by key: many reservations are in the same scopes
local offset = 0

for a = 2, #ARGV, 3 do
  local member, micros, plan = ARGV[a], tonumber(ARGV[a + 1]), cmsgpack.unpack(ARGV[a + 2])
  local keys = 1 + #plan
  local text = call('GET', KEYS[offset + 1])
  local record = text and cmsgpack.unpack(text)
  if not record or record[1] <= now then
    record = {now + RECORD_US, string.rep('2', #plan)}
    call('SET', KEYS[offset + 1], cmsgpack.pack(record), 'PX', RECORD_US / 1000 + MARGIN_MS)
  end
  for scope, rule in ipairs(plan) do
    if rule[5] > 0 then
      keys = keys + 1
      if record[2] and string.sub(record[2], scope, scope) ~= '0' then
        local name, key = KEYS[offset + 1 + scope], KEYS[offset + rule[5]]
        local state = states[name] or state_of(call('GET', name))
        states[name] = state
        drop_all_expired(state, key, now)
        hold(state, key, member, micros, runs_out, now)
      end
    end
  end
  offset = offset + keys
end
for name, state in pairs(states) do
  save(name, state, now)
end
return 1
