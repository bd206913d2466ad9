-- Limits.read. KEYS: each scope's state, the leases of the scopes that have some. ARGV: the plan, as for admit; the
-- positions of leases count from 2 there, since a request's record comes first.
-- Answers {now, {{mark, ...}, in use, reserved, {spent, ...}}, ...}. Writes nothing.
-- include: limits
local now = clock()
local plan = cmsgpack.unpack(ARGV[1])
local values = call('MGET', unpack(KEYS, 1, #plan))
local answer = {now}

local function leases(state, key)
  if state[LAST] > 0 and state[LAST] <= now then return 0, 0 end
  local reserved = state[RESERVED]
  for _, member in ipairs(call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, PRUNE)) do
    reserved = reserved - string.match(member, '\n(%d+)$')
  end
  return call('ZCOUNT', key, string.format('(%.0f', now), '+inf'), math.max(reserved, 0)
end

for scope, rule in ipairs(plan) do
  local state = state_of(values[scope])
  local marks, spent, in_use, reserved = {}, {}, 0, 0
  for r = 1, #rule[1], 5 do marks[#marks + 1] = state[rule[1][r] + 1] end
  if rule[5] > 0 then in_use, reserved = leases(state, KEYS[rule[5] - 1]) end
  for r = 1, rule[3] and #rule[3] or 0, 5 do
    local _, count = budget(state, rule[3], r, now)
    spent[#spent + 1] = count
  end
  answer[#answer + 1] = {marks, in_use, reserved, spent}
end
return answer
