-- Note a gateway process as live; see RedisStore.beat.
-- KEYS[1] sorted set: process -> until when it counts, microseconds. ARGV: process, ttl in microseconds.
-- Returns how many are live, this one included, and 1 if it was live before, 0 if Redis did not know it (any more).
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local ttl = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
local known = redis.call('ZSCORE', KEYS[1], ARGV[1]) and 1 or 0
if ttl > 0 then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + ttl), ARGV[1])
else
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return { redis.call('ZCARD', KEYS[1]), known }
