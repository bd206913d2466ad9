-- Places.leave. ARGV: prefix, pool, room (MessagePack), id, gateway, used or ''. Answers the gateway's granted ids.
-- include: places
local prefix, pool, room, id, gateway = ARGV[1], ARGV[2], unpack_(ARGV[3]), ARGV[4], ARGV[5]

local function measure()
  if s[RELEASED] ~= 0 then
    local sample = now - s[RELEASED]
    if s[INTERVAL] ~= 0 and now - s[MEASURED] <= STALE then
      sample = s[INTERVAL] + floor((sample - s[INTERVAL]) / 16)
    end
    s[INTERVAL] = max(1, sample)
    s[MEASURED] = now
  end
  s[RELEASED] = now
end

open_state()
see(gateway)
local ticket = call('HGET', HELD, id)
if ticket then
  if room[PLACES] > 0 and (sum(WAITING) > 0 or sum(RUNNING) >= room[PLACES]) then measure() else s[RELEASED] = 0 end
  give_back(unpack_(ticket), tonumber(ARGV[6]))
elseif sum(WAITING) > 0 then
  local entry = call('HGET', QUEUED, id)
  if entry then take_out(entry, ticket_of(entry), false) end
end
if now - s[GONE_SINCE] >= REMEMBER or s[GONE_COUNT] >= MAX_GONE then turn_over() end
s[GONE_COUNT] = s[GONE_COUNT] + call('SADD', GONE, id)
if s[GONE_COUNT] == 1 then call('PEXPIRE', GONE, REMEMBER_MS) end
expire()
if sum(WAITING) > 0 then
  bury(room)
  dispatch(room)
end
if sum(WAITING) == 0 and sum(RUNNING) < room[PLACES] then s[RELEASED] = 0 end
local granted = {}
if #told > 0 then
  publish(prefix, pool, function(owner, other)
    if owner ~= gateway then return false end
    granted[#granted + 1] = other
    return true
  end)
end
tidy()
save()
return granted
