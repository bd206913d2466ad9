-- One page of what is new to a reader; see Store.read_since.
-- KEYS, ARGV[1], ARGV[2]: see facts. ARGV[3] generation and [4] number of the reader's cursor, [5] the last number it was
-- given on an earlier page, [6] most changes and [7] about how many bytes of a page.
-- Returns {generation, number, 1 if the reader has to begin anew, since, position, 1 if there is more,
--   microseconds until the next fact ends or -1, key, value or nil, key, value or nil, ...}. For the next page, since and
-- position are ARGV[4] and ARGV[5].
-- include: facts
save()
local since, position, anew = tonumber(ARGV[4]), tonumber(ARGV[5]), 0
if ARGV[3] ~= generation or since < forgotten or since > number then
  since, position, anew = number, 0, 1
end
local most, room = tonumber(ARGV[6]), tonumber(ARGV[7])
local answer = {generation, whole(number), anew, '', '', 0, -1}
local news = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. whole(position), '+inf', 'WITHSCORES', 'LIMIT', 0, most)
local told = 0
for i = 1, #news, 2 do
  local value = redis.call('HGET', KEYS[1], news[i])
  answer[#answer + 1] = news[i]
  answer[#answer + 1] = value
  position = tonumber(news[i + 1])
  told = told + 1
  room = room - #news[i] - #(value or '')
  if room <= 0 then
    break
  end
end
answer[4], answer[5] = whole(since), whole(position)
if told > 0 and position < number and (told == most or room <= 0) then
  answer[6] = 1
end
local first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
if first[2] then
  answer[7] = tonumber(first[2]) - now
end
return answer
