-- Places.enter. ARGV: prefix, pool, room, ticket (MessagePack). Answers {state, position, wait, reason}.
-- include: places
local prefix, pool, room, ticket = ARGV[1], ARGV[2], unpack_(ARGV[3]), unpack_(ARGV[4])
local id, band, tenant = ticket[ID], ticket[BAND] + 1, ticket[TENANT]

local function refused(position, wait, reason)
  return {'refused', position, wait, reason}
end

-- When there is no room, or somebody waits.
local function enter_line(open)
  local function full(itself)
    local own = 0
    for each = 1, 4 do
      if s[WAITING + each] > 0 then own = own + call('ZLEXCOUNT', LINE, range_of(tenant, each)) end
    end
    own = own - itself
    if own >= room[MAX_PER_TENANT] then return refused(own, (own + 1) * interval(), 'tenant_full') end
    local waiting = sum(WAITING) - itself
    if waiting >= room[MAX_WAITING] or (band == 4 and s[WAITING + 4] - itself >= floor(room[MAX_WAITING] / 2)) then
      return refused(waiting, (waiting + 1) * interval(), 'pool_full')
    end
  end

  local function position_of(entry)
    local from, to = range_of(tenant, band)
    local queue = call('ZLEXCOUNT', LINE, from, to)
    local own = call('ZLEXCOUNT', LINE, from, '(' .. entry)
    local head = own == 0 and entry or first_entry(tenant, band)
    local start = call('ZSCORE', HEADS[band], number_of(head) .. tenant)
    local rank = call('ZCOUNT', HEADS[band], '-inf', start) - 1
    local ahead = own + min(s[WAITING + band] - queue, rank + (call('ZCARD', HEADS[band]) - 1) * own)
    local shares = shares_of(room)
    local all = ahead
    for other = 1, 4 do
      if other ~= band and s[WAITING + other] > 0 then
        all = all + min(s[WAITING + other], floor((ahead + 1) * shares[other] / shares[band]))
      end
    end
    return all
  end

  if room[PLACES] == 0 then s[RELEASED] = 0 end
  if sum(WAITING) > 0 then bury(room) else open_queue() end
  local entry = call('HGET', QUEUED, id)
  if entry then
    band, tenant = ticket_of(entry)[BAND] + 1, ticket_of(entry)[TENANT]
    local position = position_of(entry)
    return {'waiting', position, (position + 1) * interval(), ''}
  end
  local answer = not open and full(0)
  if answer then return answer end
  entry = put_in(ticket)
  if open then
    dispatch(room)
    local granted = call('HGET', HELD, id)
    if granted then
      granted = unpack_(granted)
      granted[UNCONFIRMED] = 0
      call('HSET', HELD, id, pack(granted))
      call('ZADD', ENDS, whole(now + room[LEASE]), id)
      s[NEXT_END] = min(s[NEXT_END], now + room[LEASE])
      return {'granted', 0, 0, ''}
    end
    answer = full(1)
    if answer then
      take_out(entry, ticket, false)
      return answer
    end
  end
  local position = position_of(entry)
  local wait = (position + 1) * interval()
  if ticket[MAX_WAIT] <= 0 or wait > ticket[MAX_WAIT] then
    take_out(entry, ticket, false)
    return refused(position, wait, 'too_late')
  end
  return {'waiting', position, wait, ''}
end

local function enter()
  if call('HEXISTS', HELD, id) == 1 then return {'granted', 0, 0, ''} end
  if has_left(id) then return refused(0, 0, 'left') end
  local places, limit, waiting = room[PLACES], room[LIMIT], sum(WAITING)
  local open = sum(RUNNING) < places and (not limit or limit > 0)
  if waiting == 0 and open then
    local tokens = limit and min(ticket[KV], limit) or ticket[KV]
    if not limit or sum(TOKENS) + tokens <= limit then
      grant(ticket, tokens, start_of(band, tenant), now + room[LEASE], 0)
      return {'granted', 0, 0, ''}
    end
  end
  return enter_line(open)
end

open_state()
see(ticket[GATEWAY])
expire()
local answer = enter()
if #told > 0 then
  publish(prefix, pool, function(_, other) return other == id end)
end
save()
return answer
