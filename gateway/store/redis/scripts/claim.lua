-- Take a lease or renew it; see Store.claim.
-- KEYS[1]: the lease: '<end in microseconds> <holder>'. ARGV: holder, ttl in microseconds. Returns 1 or 0.
-- The end decides. Redis' own expiry of the key comes later and only clears up.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local held = redis.call('GET', KEYS[1])
if held then
  local ends, holder = string.match(held, '^(%d+) (.*)$')
  if tonumber(ends) > now and holder ~= ARGV[1] then
    return 0
  end
end
local ttl = tonumber(ARGV[2])
redis.call('SET', KEYS[1], string.format('%.0f', now + ttl) .. ' ' .. ARGV[1],
  'PX', string.format('%.0f', math.ceil(ttl / 1000) + 1000))
return 1
