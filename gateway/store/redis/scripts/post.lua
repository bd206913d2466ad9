-- State a fact; see Store.post. Returns 1, or 0 if there is no room.
-- KEYS, ARGV[1], ARGV[2]: see facts. ARGV[3] key, [4] value, [5] ttl in microseconds or 0, [6] most bytes, [7] channel
-- include: facts
local key, value, ttl = ARGV[3], ARGV[4], tonumber(ARGV[5])
local size = bytes + #key + #value + FACT_BYTES - (weight(key) or 0)
if size > tonumber(ARGV[6]) then
  save()
  return 0
end
bytes = size
redis.call('HSET', KEYS[1], key, value)
redis.call('ZREM', KEYS[3], key)
note_change(key)
if ttl > 0 then
  redis.call('ZADD', KEYS[4], whole(now + ttl), key)
else
  redis.call('ZREM', KEYS[4], key)
end
save()
redis.call('PUBLISH', ARGV[7], '')
return 1
