-- What post, withdraw and read share: the log of facts. The memory store's FactLog is its specification.
--
-- KEYS[1] hash: key -> value, of facts that hold
-- KEYS[2] sorted set: key -> number of its last change, of facts that hold and of ended ones
-- KEYS[3] sorted set: key -> number of its end, of ended ones (tombstones)
-- KEYS[4] sorted set: key -> when it ends, microseconds
-- KEYS[5] hash: generation, number (of the last change), forgotten (the last change dropped), bytes
-- ARGV[1] a random text: the generation, should this Redis have none; ARGV[2] most tombstones
--
-- A change's number is the time in microseconds, or one more than the last one. So a replica that took over without
-- having seen the last changes does not give their numbers to others.
local FACT_BYTES = 100
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local meta = redis.call('HMGET', KEYS[5], 'generation', 'number', 'forgotten', 'bytes')
local generation = meta[1]
local number = tonumber(meta[2] or '0')
local forgotten = tonumber(meta[3] or '0')
local bytes = tonumber(meta[4] or '0')
local changed = false

local function whole(value)
  return string.format('%.0f', value)
end

if not generation then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  generation, number, forgotten, bytes, changed = ARGV[1], 0, 0, 0, true
end

-- Bytes that a fact counts with; nil if the key says nothing.
local function weight(key)
  if redis.call('HEXISTS', KEYS[1], key) == 0 then
    return nil
  end
  return #key + redis.call('HSTRLEN', KEYS[1], key) + FACT_BYTES
end

local function note_change(key)
  number = math.max(number + 1, now)
  changed = true
  redis.call('ZADD', KEYS[2], whole(number), key)
end

-- Whether there was something to end.
local function finish(key)
  local size = weight(key)
  redis.call('ZREM', KEYS[4], key)
  if not size then
    return false
  end
  bytes = bytes - size
  redis.call('HDEL', KEYS[1], key)
  note_change(key)
  redis.call('ZADD', KEYS[3], whole(number), key)
  local over = redis.call('ZCARD', KEYS[3]) - tonumber(ARGV[2])
  if over > 0 then
    local oldest = redis.call('ZRANGE', KEYS[3], 0, over - 1, 'WITHSCORES')
    for i = 1, #oldest, 2 do
      redis.call('ZREM', KEYS[2], oldest[i])
      forgotten = tonumber(oldest[i + 1])
    end
    redis.call('ZREMRANGEBYRANK', KEYS[3], 0, over - 1)
  end
  return true
end

for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', whole(now))) do
  finish(key)
end

local function save()
  if changed then
    redis.call('HSET', KEYS[5], 'generation', generation, 'number', whole(number), 'forgotten', whole(forgotten),
      'bytes', whole(bytes))
  end
end
