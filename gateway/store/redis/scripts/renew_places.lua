-- Places.renew. ARGV: prefix, pool, room (MessagePack), gateway, how many places it holds, for each of them id and
-- ticket (MessagePack), then the ids that wait. Answers {granted ids, lost ids}.
-- include: places
local prefix, pool, room, gateway, count = ARGV[1], ARGV[2], unpack_(ARGV[3]), ARGV[4], tonumber(ARGV[5])
open_state()
see(gateway)
if room[PLACES] == 0 then s[RELEASED] = 0 end
local ends = now + room[LEASE]
local ends_text = whole(ends)
for a = 6, 5 + 2 * count, 2 do
  local id = ARGV[a]
  local text = call('HGET', HELD, id)
  if text then
    call('ZADD', ENDS, ends_text, id)
    local ticket = unpack_(text)
    if ticket[UNCONFIRMED] == 1 then
      ticket[UNCONFIRMED] = 0
      call('HSET', HELD, id, pack(ticket))
    end
    s[NEXT_END] = min(s[NEXT_END], ends)
  elseif not has_left(id) then
    local entry = call('HGET', QUEUED, id)
    if entry then take_out(entry, ticket_of(entry), false) end
    local ticket = unpack_(ARGV[a + 1])
    hold(ticket, room[LIMIT] and min(ticket[KV], max(0, room[LIMIT])) or ticket[KV], ends, 0)
  end
end
expire()
if sum(WAITING) > 0 then
  bury(room)
  dispatch(room)
end
local granted, lost, answered = {}, {}, {}
for a = 6 + 2 * count, #ARGV do
  local id = ARGV[a]
  local until_ = call('ZSCORE', ENDS, id)
  if until_ then
    granted[#granted + 1] = id
    answered[id] = true
    call('ZADD', ENDS, whole(max(tonumber(until_), now + room[GRANT])), id)
  elseif call('HEXISTS', QUEUED, id) == 0 then
    lost[#lost + 1] = id
  end
end
if #told > 0 then
  publish(prefix, pool, function(_, id) return answered[id] end)
end
tidy()
save()
return {granted, lost}
